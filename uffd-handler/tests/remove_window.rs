//! The page server killed in the one instant that no other test can be relied on to hit: it has
//! taken the message of a VMM that gives pages back out of the kernel's queue, the VMM goes on
//! because of that, and not one more instruction of the page server was run.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rig::fake_vmm::{Answer, Command};
use rig::oracle;
use uffd_handler::supervisor::{MemoryPlan, PagerEvent};

/// A thread of another process, under a debugger: this thread.
struct Traced(Pid);

impl Traced {
    fn seize(thread: Pid) -> Self {
        ptrace::seize(thread, ptrace::Options::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(thread).unwrap();
        let traced = Self(thread);
        traced.wait();
        traced
    }

    fn wait(&self) -> WaitStatus {
        waitpid(self.0, Some(WaitPidFlag::__WALL)).unwrap()
    }

    /// Lets it run until a `read` has brought something; it has not returned to its program then.
    fn run_until_it_has_read(&self) {
        loop {
            ptrace::syscall(self.0, None).unwrap();
            match self.wait() {
                WaitStatus::PtraceSyscall(_) => {
                    let registers = ptrace::getregs(self.0).unwrap();
                    let is_read = registers.orig_rax == libc::SYS_read as u64;
                    // At the entry of a call it is -ENOSYS.
                    if is_read && registers.rax as i64 > 0 {
                        return;
                    }
                }
                WaitStatus::PtraceEvent(..) | WaitStatus::Stopped(..) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// The thread of the page server that reads messages.
fn fault_thread(pager: i32) -> Pid {
    let tasks = std::fs::read_dir(format!("/proc/{pager}/task")).unwrap();
    let mut found = tasks.map(|task| task.unwrap().path()).filter(|task| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "faults\n")
    });
    let task = found.next().expect("it serves a VM");
    assert_eq!(found.next(), None, "one VM, one fault thread");
    Pid::from_raw(task.file_name().unwrap().to_str().unwrap().parse().unwrap())
}

#[test]
fn a_remove_that_its_reader_did_not_live_to_note_is_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 64);
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    for (name, shared) in [("private", false), ("shared", true)] {
        let mut setup = rig::setup(dir, name, &[64]);
        setup.shared = shared;
        let (vmm, handshake) = rig::start(&setup);
        let plan = MemoryPlan::flat(dir.join("memory"), None);
        supervisor.add_vm(name, handshake, &plan).unwrap();
        let mut cpu = vmm.cpu();
        assert_eq!(cpu.read(1), crc32fast::hash(&oracle::template(7, 1)));

        // Pages that were never in place: nothing but the message says that they were given back.
        let pager = supervisor.pager_pid();
        let traced = Traced::seize(fault_thread(pager));
        cpu.send(&Command::Remove { first: 4, count: 2 });
        traced.run_until_it_has_read();
        assert_eq!(cpu.answer_within(rig::DEADLINE), Some(Answer::Done), "the VMM goes on");
        kill(Pid::from_raw(pager), Signal::SIGKILL).unwrap();
        assert!(matches!(traced.wait(), WaitStatus::Signaled(..)));

        let event = events.recv_timeout(rig::DEADLINE).unwrap();
        assert!(matches!(event, PagerEvent::PagerRestarted { .. }), "{event:?}");
        for page in [4, 5] {
            assert_eq!(cpu.read(page), crc32fast::hash(&[0; 4096]), "page {page}, {name}");
        }
        assert_eq!(cpu.read(6), crc32fast::hash(&oracle::template(7, 6)));
        drop(vmm);
        supervisor.remove_vm(name);
        assert!(matches!(events.try_recv(), Err(_) | Ok(PagerEvent::VmGone { .. })));
    }
    supervisor.shutdown();
}
