//! QEMU with the small guest: started, frozen, and loaded again.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{code, rig};

/// How long anything may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A QEMU with the guest of [`code`]; killed when dropped.
pub struct Qemu {
    pub child: Child,
    dir: PathBuf,
}

impl Qemu {
    pub fn start(dir: &Path, memory: &str, extra: &[&str], env: &[(&str, &str)]) -> Self {
        std::fs::write(dir.join("firmware"), code::firmware()).unwrap();
        let _ = std::fs::remove_file(dir.join("qmp"));
        let qmp = format!("unix:{}/qmp,server=on,wait=off", dir.display());
        let console = format!("file,id=out,path={}/out", dir.display());
        let child = Command::new("qemu-system-x86_64")
            .args(["-M", "microvm,accel=tcg,memory-backend=mem", "-m", "32", "-cpu", "max"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-object", memory, "-qmp", &qmp, "-chardev", &console])
            .args(["-device", "isa-debugcon,iobase=0xe9,chardev=out"])
            .arg("-bios")
            .arg(dir.join("firmware"))
            .args(extra)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, dir: dir.to_path_buf() }
    }

    pub fn qmp(&self) -> Qmp {
        let path = self.dir.join("qmp");
        let end = Instant::now() + DEADLINE;
        let stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < end, "QMP: {error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut qmp = Qmp { reader: BufReader::new(stream.try_clone().unwrap()), stream };
        let mut greeting = String::new();
        qmp.reader.read_line(&mut greeting).unwrap();
        qmp.command("qmp_capabilities", "{}");
        qmp
    }

    /// What the guest has said, once it is so much.
    pub fn wait_output(&self, passes: usize) -> String {
        rig::eventually(DEADLINE, || {
            let mut out = String::new();
            File::open(self.dir.join("out")).ok()?.read_to_string(&mut out).ok()?;
            (out.len() >= passes).then_some(out)
        })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Its control socket.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    stream: UnixStream,
}

impl Qmp {
    pub fn command(&mut self, name: &str, arguments: &str) -> String {
        writeln!(self.stream, "{{\"execute\":\"{name}\",\"arguments\":{arguments}}}").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.reader.read_line(&mut line).unwrap() > 0, "QMP closed at {name}");
            if line.contains("\"return\"") || line.contains("\"error\"") {
                assert!(!line.contains("\"error\""), "{name}: {line}");
                return line;
            }
        }
    }

    /// Saves or loads, without memory that is shared if that is left out.
    pub fn migrate(&mut self, command: &str, uri: &str, without_memory: bool) {
        let ignore = format!(
            r#"{{"capabilities":[{{"capability":"x-ignore-shared","state":{without_memory}}}]}}"#
        );
        self.command("migrate-set-capabilities", &ignore);
        self.command(command, &format!("{{\"uri\":\"exec:{uri}\"}}"));
        rig::eventually(DEADLINE, || {
            let status = self.command("query-migrate", "{}");
            assert!(!status.contains("failed"), "{status}");
            status.contains("completed").then_some(())
        });
    }
}

/// Boots a guest and leaves `memory`, `state` (which goes with it) and `whole`, QEMU's own snapshot
/// with the memory in it.
pub fn freeze(dir: &Path) {
    let memory = dir.join("memory");
    File::create(&memory).unwrap().set_len(code::MEMORY_BYTES).unwrap();
    let backend =
        format!("memory-backend-file,id=mem,size=32M,share=on,mem-path={}", memory.display());
    let qemu = Qemu::start(dir, &backend, &[], &[]);
    assert!(!qemu.wait_output(2).contains('X'));
    let mut qmp = qemu.qmp();
    qmp.command("stop", "{}");
    qmp.migrate("migrate", &format!("cat > {}/whole", dir.display()), false);
    // QEMU wants it to have run before it is saved again. The memory file is that of the last time.
    qmp.command("cont", "{}");
    qmp.command("stop", "{}");
    qmp.migrate("migrate", &format!("cat > {}/state", dir.display()), true);
    qmp.command("quit", "{}");
}
