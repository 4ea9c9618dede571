//! Starting a process with as little work as the kernel allows.
//!
//! One clone3 shares the agent's memory with the child until it executes its program (no page
//! tables are copied, no page of the agent is made to fault), places it in the workload's cgroup
//! and returns a pidfd. The child runs on a stack of its own and reports through the shared
//! memory why it could not execute, so the caller knows at once.

use std::ffi::{CString, c_char, c_int};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the guest agent starts processes with x86-64 instructions");

/// The child only makes system calls; this is plenty.
const STACK: usize = 32 * 1024;
/// The kernel's flag; it does not fit the type libc gives such flags.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Everything the child needs, prepared before it exists.
#[derive(Debug)]
pub struct Plan {
    /// Files to try in turn, as execvp(3) would.
    pub candidates: Vec<CString>,
    /// Arguments, the program's name first.
    pub argv: Vec<CString>,
    /// Environment, `NAME=value`.
    pub env: Vec<CString>,
    /// Working directory.
    pub cwd: CString,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Make standard input the controlling terminal.
    pub terminal: bool,
}

/// Why a process did not come to be.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The kernel makes no process now.
    #[error("no new process: {0}")]
    Clone(io::Error),
    /// The working directory cannot be entered.
    #[error("working directory: {0}")]
    Cwd(io::Error),
    /// The user cannot be become.
    #[error("user: {0}")]
    User(io::Error),
    /// Standard input, output, error or the terminal cannot be set up.
    #[error("standard streams: {0}")]
    Streams(io::Error),
    /// The program cannot be executed.
    #[error("execute: {0}")]
    Exec(io::Error),
}

/// A started process.
#[derive(Debug)]
pub struct Child {
    /// Its id, which is its process group's too.
    pub pid: i32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
}

const STAGE_STREAMS: i32 = 1;
const STAGE_USER: i32 = 2;
const STAGE_CWD: i32 = 3;
const STAGE_EXEC: i32 = 4;

/// What the child reads, and where it leaves its error.
struct Shared<'a> {
    plan: &'a Plan,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    streams: [c_int; 3],
    stage: i32,
    errno: i32,
}

/// The kernel's `struct clone_args`, up to `cgroup`.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

/// Starts the process with these three streams, in `cgroup` when there is one.
///
/// # Errors
/// See [`SpawnError`]; the child is gone in every case.
pub fn spawn(
    plan: &Plan,
    streams: [BorrowedFd<'_>; 3],
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Child, SpawnError> {
    let mut shared = Shared {
        plan,
        argv: pointers(&plan.argv),
        env: pointers(&plan.env),
        streams: streams.map(|fd| fd.as_raw_fd()),
        stage: 0,
        errno: 0,
    };
    let mut stack = Vec::<u128>::with_capacity(STACK / size_of::<u128>());
    let mut pidfd: c_int = -1;
    let vm = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD;
    let mut args = CloneArgs {
        flags: vm as u64,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: (stack.capacity() * size_of::<u128>()) as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // No handler of this process may run in the child, which shares its memory.
    let result = with_signals_blocked(|| {
        // SAFETY: `args` is a valid clone_args with a stack of its own; `run_child` never returns
        // and touches only `shared`, which outlives it: CLONE_VFORK holds this thread until the
        // child has executed its program or ended.
        unsafe { clone3(&raw mut args, &raw mut shared) }
    });
    drop(stack);
    if result < 0 {
        return Err(SpawnError::Clone(io::Error::from_raw_os_error(-result as i32)));
    }
    // SAFETY: the kernel put a new descriptor here, since clone3 succeeded with CLONE_PIDFD.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // SAFETY: a volatile read of a live local, written by the child through its pointer.
    let stage = unsafe { ptr::read_volatile(&raw const shared.stage) };
    if stage == 0 {
        return Ok(Child { pid: result as i32, pidfd });
    }
    // The child has ended by now, so this takes its remains without waiting.
    super::reap::wait(&pidfd, 0);
    // SAFETY: as above.
    let errno = unsafe { ptr::read_volatile(&raw const shared.errno) };
    let error = io::Error::from_raw_os_error(errno);
    Err(match stage {
        STAGE_STREAMS => SpawnError::Streams(error),
        STAGE_USER => SpawnError::User(error),
        STAGE_CWD => SpawnError::Cwd(error),
        _ => SpawnError::Exec(error),
    })
}

fn with_signals_blocked<T>(f: impl FnOnce() -> T) -> T {
    let all = nix::sys::signal::SigSet::all();
    let old = all.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK);
    let result = f();
    if let Ok(old) = old {
        // The mask was just read from the kernel: setting it back cannot fail.
        let _ = old.thread_set_mask();
    }
    result
}

/// Returns the child's pid or a negative errno in the parent; the child runs [`run_child`].
///
/// # Safety
/// `args` must hold a stack, CLONE_VM and CLONE_VFORK; `shared` must outlive the call.
unsafe fn clone3(args: *mut CloneArgs, shared: *mut Shared<'_>) -> i64 {
    let result: i64;
    // SAFETY: a system call; in the child, which has a fresh 16-byte aligned stack, the code calls
    // a function that never returns, so nothing of this frame is used by it.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") args,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") shared,
            in("r13") run_child as *const (),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// Life of the child before its program. Only system calls: the memory is the agent's.
extern "C" fn run_child(shared: *mut Shared<'static>) -> ! {
    // SAFETY: the parent waits in clone3 and keeps `shared` alive; nobody else uses it meanwhile.
    let shared = unsafe { &mut *shared };
    let stage = prepare(shared);
    // SAFETY: errno is this thread's, shared with the waiting parent, and readable.
    shared.errno = unsafe { *libc::__errno_location() };
    shared.stage = stage;
    // SAFETY: ends the child only; it is a process, not a thread of the agent.
    unsafe { libc::syscall(libc::SYS_exit_group, 127) };
    loop {
        std::hint::spin_loop();
    }
}

/// Returns the stage that failed; does not return when the program runs.
fn prepare(shared: &Shared<'_>) -> i32 {
    let plan = shared.plan;
    // SAFETY: plain system calls on valid arguments. The identity calls bypass libc, whose
    // wrappers would change every thread of the agent. Signal dispositions are the child's own.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGPIPE, &raw const default, ptr::null_mut());
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        libc::syscall(libc::SYS_setsid);
        for (target, fd) in shared.streams.iter().enumerate() {
            // The descriptors are all above 2, so that none is overwritten before its turn.
            if libc::dup2(*fd, target as c_int) < 0 {
                return STAGE_STREAMS;
            }
        }
        if plan.terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return STAGE_STREAMS;
        }
        // The agent is spared when memory runs out; what it starts is not.
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY);
        if fd >= 0 {
            libc::write(fd, c"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
        let groups = plan.groups.as_ptr();
        if libc::syscall(libc::SYS_setgroups, plan.groups.len(), groups) < 0
            || libc::syscall(libc::SYS_setresgid, plan.gid, plan.gid, plan.gid) < 0
            || libc::syscall(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid) < 0
        {
            return STAGE_USER;
        }
        if libc::chdir(plan.cwd.as_ptr()) < 0 {
            return STAGE_CWD;
        }
        libc::umask(0o022);
        let mut denied = false;
        for program in &plan.candidates {
            libc::execve(program.as_ptr(), shared.argv.as_ptr(), shared.env.as_ptr());
            match *libc::__errno_location() {
                libc::EACCES => denied = true,
                libc::ENOENT | libc::ENOTDIR => {}
                _ => return STAGE_EXEC,
            }
        }
        *libc::__errno_location() = if denied { libc::EACCES } else { libc::ENOENT };
    }
    STAGE_EXEC
}
