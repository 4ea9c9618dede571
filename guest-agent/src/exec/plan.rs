//! From a request to a plan: user, environment, working directory and program, all checked before
//! a process exists.

use super::spawn::{Plan, SpawnError};
use crate::agent::Agent;
use crate::server::ApiError;
use crate::users::{self, User};
use crate::wire::{ExecRequest, codes};
use std::collections::BTreeMap;
use std::ffi::CString;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Arguments and environment together; the kernel's own limit is 2 MiB.
const MAX_BYTES: usize = 1024 * 1024;

fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(422, codes::INVALID_COMMAND, message)
}

fn c_string(text: impl Into<Vec<u8>>, what: &str) -> Result<CString, ApiError> {
    CString::new(text).map_err(|_| invalid(format!("{what} holds a NUL byte")))
}

/// Refuses names that no environment can hold.
///
/// # Errors
/// 422 `invalid_command`.
pub fn check_env(env: &BTreeMap<String, String>) -> Result<(), ApiError> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(invalid(format!("{name:?} cannot be an environment variable")));
        }
    }
    Ok(())
}

/// Resolves the user of a request.
///
/// # Errors
/// 422 `user_not_found`.
pub fn find_user(agent: &Agent, name: Option<&str>) -> Result<User, ApiError> {
    let name = name.filter(|n| !n.is_empty()).unwrap_or("root");
    users::find_user(agent.root(), name)?.ok_or_else(|| {
        ApiError::new(422, codes::USER_NOT_FOUND, format!("there is no user {name:?}"))
    })
}

/// Makes the plan.
///
/// # Errors
/// 422 with the code of what is wrong.
pub fn plan(agent: &Agent, request: &ExecRequest) -> Result<(Plan, User, String), ApiError> {
    let program = match request.argv.first() {
        Some(program) if !program.is_empty() => program,
        _ => return Err(invalid("argv names no program")),
    };
    check_env(&request.env)?;
    let user = find_user(agent, request.user.as_deref())?;
    let groups = users::groups_of(agent.root(), &user)?;

    let claimed = agent.env.borrow();
    let mut env: BTreeMap<&str, &str> = BTreeMap::new();
    env.insert("PATH", PATH);
    env.insert("HOME", &user.home);
    env.insert("USER", &user.name);
    env.insert("LOGNAME", &user.name);
    env.insert("LANG", "C.UTF-8");
    if request.pty.is_some() {
        env.insert("TERM", "xterm-256color");
    }
    let layers = claimed.iter().chain(&request.env);
    env.extend(layers.map(|(name, value)| (name.as_str(), value.as_str())));

    let size = request.argv.iter().map(String::len).sum::<usize>()
        + env.iter().map(|(name, value)| name.len() + value.len() + 2).sum::<usize>();
    if size > MAX_BYTES {
        return Err(invalid(format!(
            "arguments and environment are {size} bytes, the limit is {MAX_BYTES}"
        )));
    }
    let candidates = if program.contains('/') {
        vec![c_string(program.as_str(), "argv[0]")?]
    } else {
        let path = env.get("PATH").copied().unwrap_or(PATH);
        path.split(':')
            .map(|dir| if dir.is_empty() { "." } else { dir })
            .map(|dir| c_string(format!("{dir}/{program}"), "argv[0]"))
            .collect::<Result<_, _>>()?
    };
    let argv =
        request.argv.iter().map(|arg| c_string(arg.as_str(), "argv")).collect::<Result<_, _>>()?;
    let strings = env.iter().map(|(name, value)| c_string(format!("{name}={value}"), "env"));
    let strings = strings.collect::<Result<_, _>>()?;
    let cwd = request.cwd.clone().filter(|c| !c.is_empty()).unwrap_or_else(|| user.home.clone());
    if !cwd.starts_with('/') {
        return Err(ApiError::new(
            422,
            codes::CWD_NOT_FOUND,
            format!("working directory {cwd:?} is not absolute"),
        ));
    }
    let plan = Plan {
        candidates,
        argv,
        env: strings,
        cwd: c_string(cwd.as_str(), "cwd")?,
        uid: user.uid,
        gid: user.gid,
        groups,
        terminal: request.pty.is_some(),
    };
    drop(claimed);
    Ok((plan, user, cwd))
}

/// What a failed start means to the caller.
pub fn refusal(error: &SpawnError, request: &ExecRequest, cwd: &str) -> ApiError {
    let program = request.argv.first().map_or("", String::as_str);
    match error {
        SpawnError::Exec(e) => match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => ApiError::new(
                422,
                codes::PROGRAM_NOT_FOUND,
                format!("there is no program {program:?} (or its interpreter is missing)"),
            ),
            Some(libc::EACCES | libc::ENOEXEC | libc::EPERM | libc::ELIBBAD) => ApiError::new(
                422,
                codes::PROGRAM_NOT_EXECUTABLE,
                format!("{program:?} cannot be executed: {e}"),
            ),
            Some(libc::E2BIG) => invalid(format!("{program:?}: {e}")),
            _ => ApiError::internal(format!("{program:?}: {e}")),
        },
        SpawnError::Cwd(e) => {
            ApiError::new(422, codes::CWD_NOT_FOUND, format!("working directory {cwd:?}: {e}"))
        }
        SpawnError::Clone(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
            ApiError::new(429, codes::TOO_MANY_PROCESSES, error.to_string())
        }
        _ => ApiError::internal(error.to_string()),
    }
}
