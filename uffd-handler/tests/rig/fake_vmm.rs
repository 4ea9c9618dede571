//! A VMM without a guest: a process that maps memory, hands it over like Firecracker does, and
//! touches it on command.
//!
//! It is this test binary, started again: a constructor sees the variable and never reaches `main`.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uffd_handler::fdpass;
use userfaultfd::{FeatureFlags, UffdBuilder};

use super::oracle::{self, PAGE};

const VARIABLE: &str = "RETHAW_TEST_FAKE_VMM";

/// What the fake VMM maps and whom it tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    pub handshake: PathBuf,
    pub commands: PathBuf,
    /// Pages of each region.
    pub regions: Vec<u64>,
    /// On pages of 2 MiB.
    pub huge: bool,
    /// Shared memory, as QEMU has it, or private, as Firecracker has it.
    pub shared: bool,
    /// Report ranges given back.
    pub removes: bool,
    pub seed: u64,
}

/// What a virtual CPU may be told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    /// Read a whole page.
    Read { page: u64 },
    /// Overwrite a page with [`oracle::written`].
    Write { page: u64, value: u64 },
    /// Have the kernel write a page, by `read(2)`.
    KernelWrite { page: u64, value: u64 },
    /// Give pages back.
    Remove { first: u64, count: u64 },
    /// Have the kernel read all memory, by `write(2)`.
    Dump { path: PathBuf },
    /// Read a range on many threads, each its part in random order, and check every byte.
    Storm { first: u64, count: u64, threads: u64 },
    /// Give pages of a range back and read them again, as fast as many threads can.
    Flood { first: u64, count: u64, threads: u64, rounds: u64 },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Page { crc: u32, nanos: u64 },
    Done,
    Storm { wrong: u64, waits_nanos: Vec<u64> },
}

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = {
    extern "C" fn constructor() {
        if let Ok(setup) = std::env::var(VARIABLE) {
            // No panic may leave here: it would run into the C library's start-up code.
            let ended = std::panic::catch_unwind(|| run(&serde_json::from_str(&setup).unwrap()));
            std::process::exit(i32::from(ended.is_err()));
        }
    }
    constructor
};

#[derive(Clone)]
struct Memory {
    /// Address and pages of each region.
    regions: Arc<Vec<(usize, u64)>>,
    shared: bool,
    seed: u64,
}

impl Memory {
    fn page(&self, mut page: u64) -> *mut u8 {
        for (base, pages) in self.regions.iter() {
            if page < *pages {
                return (base + page as usize * PAGE) as *mut u8;
            }
            page -= pages;
        }
        panic!("page {page} beyond the memory");
    }

    fn read(&self, page: u64) -> [u8; PAGE] {
        // SAFETY: `page` gives addresses of mapped pages, and nothing else refers to them.
        unsafe { std::ptr::read_volatile(self.page(page).cast()) }
    }
}

fn run(setup: &Setup) {
    // Some tests let it outlive its parent. None takes this long.
    nix::unistd::alarm::set(120);
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(true).user_mode_only(false);
    if setup.removes {
        builder.require_features(FeatureFlags::EVENT_REMOVE);
    }
    let uffd = builder.create().unwrap();
    let mut regions = Vec::new();
    let mut wire = Vec::new();
    let mut offset = 0;
    for pages in &setup.regions {
        let len = *pages as usize * PAGE;
        let kind = if setup.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let huge = if setup.huge { libc::MAP_HUGETLB | libc::MAP_HUGE_2MB } else { 0 };
        let flags = kind | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | huge;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, wherever there is room.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        uffd.register(base, len).unwrap();
        let page_size = if setup.huge { 2 << 20 } else { 4096 };
        wire.push(serde_json::json!({
            "base_host_virt_addr": base as u64, "size": len, "offset": offset,
            "page_size": page_size, "page_size_kib": page_size,
        }));
        regions.push((base as usize, *pages));
        offset += len;
    }
    let memory = Memory { regions: Arc::new(regions), shared: setup.shared, seed: setup.seed };
    let listener = UnixListener::bind(&setup.commands).unwrap();
    let handshake = UnixStream::connect(&setup.handshake).unwrap();
    let text = serde_json::to_vec(&wire).unwrap();
    // SAFETY: the descriptor lives through the call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(uffd.as_raw_fd()) };
    fdpass::send(handshake.as_fd(), &text, &[fd]).unwrap();
    // Each connection is a virtual CPU. Userfaultfd and handshake socket stay open throughout.
    for connection in listener.incoming() {
        let (memory, connection) = (memory.clone(), connection.unwrap());
        std::thread::spawn(move || virtual_cpu(&memory, connection));
    }
}

fn virtual_cpu(memory: &Memory, mut connection: UnixStream) {
    let reader = BufReader::new(connection.try_clone().unwrap());
    for line in reader.lines() {
        let Ok(line) = line else { return };
        let answer = execute(memory, serde_json::from_str(&line).unwrap());
        if writeln!(connection, "{}", serde_json::to_string(&answer).unwrap()).is_err() {
            return;
        }
    }
}

fn execute(memory: &Memory, command: Command) -> Answer {
    match command {
        Command::Read { page } => {
            let began = Instant::now();
            let bytes = memory.read(page);
            let nanos = began.elapsed().as_nanos() as u64;
            Answer::Page { crc: crc32fast::hash(&bytes), nanos }
        }
        Command::Write { page, value } => {
            // SAFETY: as in `Memory::read`.
            unsafe { std::ptr::write_volatile(memory.page(page).cast(), oracle::written(value)) };
            Answer::Done
        }
        Command::KernelWrite { page, value } => {
            let (reader, mut writer) = std::io::pipe().unwrap();
            writer.write_all(&oracle::written(value)).unwrap();
            // SAFETY: the kernel writes one page to the address of one.
            let got = unsafe { libc::read(reader.as_raw_fd(), memory.page(page).cast(), PAGE) };
            assert_eq!(got, PAGE as isize);
            Answer::Done
        }
        Command::Remove { first, count } => {
            let advice = if memory.shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
            // SAFETY: the pages are ours to give back; callers keep to one region.
            let result =
                unsafe { libc::madvise(memory.page(first).cast(), count as usize * PAGE, advice) };
            assert_eq!(result, 0);
            Answer::Done
        }
        Command::Dump { path } => {
            let mut file = std::fs::File::create(path).unwrap();
            for (base, pages) in memory.regions.iter() {
                // SAFETY: a mapped region; the kernel reads it and takes the faults.
                let bytes = unsafe {
                    std::slice::from_raw_parts(*base as *const u8, *pages as usize * PAGE)
                };
                file.write_all(bytes).unwrap();
            }
            Answer::Done
        }
        Command::Storm { first, count, threads } => storm(memory, first, count, threads),
        Command::Flood { first, count, threads, rounds } => {
            flood(memory, first, count / threads, threads, rounds)
        }
    }
}

fn storm(memory: &Memory, first: u64, count: u64, threads: u64) -> Answer {
    let share = count / threads;
    let parts: Vec<_> = (0..threads)
        .map(|thread| {
            let memory = memory.clone();
            std::thread::spawn(move || {
                let (mut wrong, mut waits) = (0, Vec::with_capacity(share as usize));
                for i in 0..share {
                    // A stride coprime to the share visits every page once, in no neighbourly order.
                    let stride = (share / 2 + 1..).find(|n| gcd(*n, share) == 1).unwrap();
                    let page = first + thread * share + i * stride % share;
                    let began = Instant::now();
                    let bytes = memory.read(page);
                    waits.push(began.elapsed().as_nanos() as u64);
                    wrong += u64::from(bytes != oracle::template(memory.seed, page));
                }
                (wrong, waits)
            })
        })
        .collect();
    let (mut wrong, mut waits_nanos) = (0, Vec::new());
    for part in parts {
        let (bad, waits) = part.join().unwrap();
        wrong += bad;
        waits_nanos.extend(waits);
    }
    Answer::Storm { wrong, waits_nanos }
}

fn flood(memory: &Memory, first: u64, share: u64, threads: u64, rounds: u64) -> Answer {
    let parts: Vec<_> = (0..threads)
        .map(|thread| {
            let memory = memory.clone();
            std::thread::spawn(move || {
                let mut wrong = 0;
                for round in 0..rounds {
                    let page = first + thread * share + round % share;
                    execute(&memory, Command::Remove { first: page, count: 1 });
                    wrong += u64::from(memory.read(page) != [0; PAGE]);
                }
                wrong
            })
        })
        .collect();
    let wrong = parts.into_iter().map(|part| part.join().unwrap()).sum();
    Answer::Storm { wrong, waits_nanos: Vec::new() }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A running fake VMM; killed when dropped.
pub struct FakeVmm {
    child: Child,
    commands: PathBuf,
}

impl FakeVmm {
    pub fn start(setup: &Setup) -> Self {
        let child = Process::new(std::env::current_exe().unwrap())
            .env(VARIABLE, serde_json::to_string(setup).unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, commands: setup.commands.clone() }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn cpu(&self) -> Cpu {
        connect(&self.commands)
    }
}

impl Drop for FakeVmm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A new virtual CPU of the fake VMM that listens there.
pub fn connect(commands: &Path) -> Cpu {
    let stream = UnixStream::connect(commands).unwrap();
    Cpu { reader: BufReader::new(stream.try_clone().unwrap()), stream }
}

/// A virtual CPU of a fake VMM.
pub struct Cpu {
    reader: BufReader<UnixStream>,
    stream: UnixStream,
}

impl Cpu {
    pub fn send(&mut self, command: &Command) {
        writeln!(self.stream, "{}", serde_json::to_string(command).unwrap()).unwrap();
    }

    /// The answer, or nothing when the VMM died or kept silent for the given time.
    pub fn answer_within(&mut self, limit: Duration) -> Option<Answer> {
        self.stream.set_read_timeout(Some(limit)).unwrap();
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(len) if len > 0 => Some(serde_json::from_str(&line).unwrap()),
            _ => None,
        }
    }

    pub fn run(&mut self, command: &Command) -> Answer {
        self.send(command);
        self.answer_within(Duration::from_secs(60)).expect("the fake VMM answers")
    }

    pub fn read(&mut self, page: u64) -> u32 {
        match self.run(&Command::Read { page }) {
            Answer::Page { crc, .. } => crc,
            other => panic!("{other:?}"),
        }
    }
}
