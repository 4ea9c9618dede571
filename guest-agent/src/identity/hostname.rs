//! The machine's name, in the kernel and in the files that name it.

use super::proof::{Context, Item, ItemError, Reading};
use super::write;

/// The item.
#[derive(Debug)]
pub struct Hostname;

const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";

/// `/etc/hosts` with `old`'s line, or the one Debian gives the host's own name, for `new`.
fn hosts(text: &str, new: &str) -> String {
    let mut out = String::with_capacity(text.len() + new.len());
    let mut done = false;
    for line in text.lines() {
        if line.split_whitespace().next() == Some("127.0.1.1") {
            if !done {
                out.push_str(&format!("127.0.1.1\t{new}\n"));
                done = true;
            }
            continue;
        }
        out.push_str(line);
        out.push('\n');
    }
    if !done {
        out.push_str(&format!("127.0.1.1\t{new}\n"));
    }
    out
}

impl Item for Hostname {
    fn name(&self) -> &'static str {
        "hostname"
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        let name = nix::unistd::gethostname()
            .map_err(|e| ItemError::io("gethostname")(e.into()))?
            .to_string_lossy()
            .into_owned();
        let file = write::read(&context.agent.path(HOSTNAME))?;
        let hosts = write::read(&context.agent.path(HOSTS))?;
        let own = hosts.lines().find_map(|l| l.strip_prefix("127.0.1.1")).unwrap_or("").trim();
        Ok(Reading::of(format!("{name}\n{}\n{own}", file.trim())))
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        let name = &context.request.hostname;
        nix::unistd::sethostname(name).map_err(|e| ItemError::io("sethostname")(e.into()))?;
        write::update(&context.agent.path(HOSTNAME), &format!("{name}\n"), 0o644)?;
        let path = context.agent.path(HOSTS);
        write::update(&path, &hosts(&write::read(&path)?, name), 0o644)
    }

    fn check(&self, context: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        let name = &context.request.hostname;
        ItemError::compare(&format!("{name}\n{name}\n{name}"), &new.value)
    }
}

#[cfg(test)]
mod tests {
    use super::hosts;

    #[test]
    fn own_line_is_replaced_or_added() {
        let text = "127.0.0.1 localhost\n127.0.1.1 golden\n::1 ip6-localhost\n";
        let wanted = "127.0.0.1 localhost\n127.0.1.1\tnew\n::1 ip6-localhost\n";
        assert_eq!(hosts(text, "new"), wanted);
        assert_eq!(hosts("127.0.0.1 localhost", "a"), "127.0.0.1 localhost\n127.0.1.1\ta\n");
    }
}
