//! Users and groups from the guest's own files: a static program cannot use libc's lookups.

use crate::agent::Agent;
use crate::query;
use crate::server::{Answer, ApiError, json};
use crate::wire::codes;
use serde::Serialize;
use std::fs;
use std::io;
use std::path::Path;

/// A line of `/etc/passwd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

impl User {
    /// The superuser, as every system has it.
    pub fn root() -> Self {
        Self {
            name: "root".to_owned(),
            uid: 0,
            gid: 0,
            home: "/root".to_owned(),
            shell: "/bin/sh".to_owned(),
        }
    }
}

fn parse_user(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next()?.to_owned();
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1)?.to_owned();
    let shell = fields.next().unwrap_or("").to_owned();
    Some(User { name, uid, gid, home, shell })
}

/// Finds a user by name or number.
///
/// # Errors
/// `/etc/passwd` cannot be read.
pub fn find_user(root: &Path, name: &str) -> io::Result<Option<User>> {
    if name == "root" {
        return Ok(Some(User::root()));
    }
    let text = fs::read_to_string(root.join("etc/passwd"))?;
    let number = name.parse::<u32>().ok();
    Ok(text.lines().filter_map(parse_user).find(|u| u.name == name || Some(u.uid) == number))
}

/// `GET /user?name=`.
///
/// # Errors
/// 422 `user_not_found`.
pub fn find(agent: &Agent, query: &str) -> Answer {
    let name = query::get(query, "name")?.unwrap_or_default();
    let user = find_user(agent.root(), &name)?.ok_or_else(|| {
        ApiError::new(422, codes::USER_NOT_FOUND, format!("there is no user {name:?}"))
    })?;
    json(&user)
}

/// Groups a user is a member of besides the primary one, which is listed first.
///
/// # Errors
/// `/etc/group` is there and cannot be read.
pub fn groups_of(root: &Path, user: &User) -> io::Result<Vec<u32>> {
    let mut groups = vec![user.gid];
    if user.uid == 0 {
        return Ok(groups);
    }
    let text = match fs::read_to_string(root.join("etc/group")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(groups),
        Err(error) => return Err(error),
    };
    for line in text.lines() {
        let mut fields = line.split(':').skip(2);
        let (Some(gid), Some(members)) = (fields.next(), fields.next()) else { continue };
        let Ok(gid) = gid.parse() else { continue };
        if gid != user.gid && members.split(',').any(|m| m == user.name) {
            groups.push(gid);
        }
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_users_and_their_groups() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        let passwd = "root:x:0:0::/root:/bin/bash\nuser:x:1000:1000:U,,,:/home/user:/bin/bash\n";
        fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        let group = "root:x:0:\nsudo:x:27:other,user\nuser:x:1000:\nwheel:x:10:other\n";
        fs::write(dir.path().join("etc/group"), group).unwrap();
        let user = find_user(dir.path(), "user").unwrap().unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_str()), (1000, 1000, "/home/user"));
        assert_eq!(find_user(dir.path(), "1000").unwrap().unwrap().name, "user");
        assert!(find_user(dir.path(), "nobody-here").unwrap().is_none());
        assert_eq!(groups_of(dir.path(), &user).unwrap(), [1000, 27]);
    }
}
