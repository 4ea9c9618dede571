//! Runs a few million instructions of guest kernel code on `/dev/kvm` and says how it went.
//!
//! A program of its own because a KVM that does not work may never come back from `KVM_RUN`: the
//! parent kills it then. It prints one JSON object per finished step, so that its parent knows how
//! far it got; what they mean is told in `snapshotter::firecracker::kvm`.

use std::ptr::NonNull;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

/// Guest memory: all the page tables and the code need.
const MEMORY: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x8000;
/// A batch of the loop below: `dec` and `jnz`.
const LOOPS_PER_BATCH: u64 = 50_000;
const INSTRUCTIONS_PER_BATCH: u64 = 2 * LOOPS_PER_BATCH;
/// Enough to measure hardware to a few percent.
const BATCHES: u64 = 100;
/// Slower than this and the measurement may end early.
const MEASURE_FOR: Duration = Duration::from_millis(1200);

const PORT_BATCH: u16 = 0x10;
const PORT_DONE: u16 = 0x11;

// The guest's code, at CPL 0 in long mode. It is copied, so it must not care where it runs.
std::arch::global_asm!(
    ".globl rethaw_probe_loop",
    ".globl rethaw_probe_kernel",
    ".globl rethaw_probe_end",
    "rethaw_probe_loop:",
    "mov ecx, 50000",
    "2: dec ecx",
    "jnz 2b",
    "out 0x10, al",
    "jmp rethaw_probe_loop",
    // What every Linux kernel runs and an interpreter of kernel code may lack.
    "rethaw_probe_kernel:",
    "mov eax, 0xff",
    "popcnt eax, eax",
    "cmp eax, 8",
    "jne 3f",
    "mov rdi, 0x9000",
    "xor eax, eax",
    "xor edx, edx",
    "xor ecx, ecx",
    "mov ebx, 7",
    "mov qword ptr [rdi], 0",
    "mov qword ptr [rdi + 8], 0",
    "lock cmpxchg16b [rdi]",
    "jne 3f",
    "cmp qword ptr [rdi], 7",
    "jne 3f",
    "out 0x11, al",
    "3: hlt",
    "rethaw_probe_end:",
);

unsafe extern "C" {
    static rethaw_probe_loop: u8;
    static rethaw_probe_kernel: u8;
    static rethaw_probe_end: u8;
}

fn main() {
    if let Err(message) = run() {
        println!("{}", serde_json::json!({ "step": "error", "message": message }));
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let kvm = Kvm::new().map_err(|e| format!("cannot open /dev/kvm: {e}"))?;
    let api = kvm.get_api_version();
    if api != 12 {
        return Err(format!("KVM speaks API version {api}, not 12"));
    }
    let vm = kvm.create_vm().map_err(|e| format!("KVM_CREATE_VM: {e}"))?;
    let memory = guest_memory()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the mapping is MEMORY bytes long and is never unmapped.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|e| format!("KVM_SET_USER_MEMORY_REGION: {e}"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(|e| format!("KVM_CREATE_VCPU: {e}"))?;
    long_mode(&kvm, &vcpu)?;
    step(&serde_json::json!({ "step": "created" }));

    let started = Instant::now();
    let mut batches = 0;
    while batches < BATCHES && started.elapsed() < MEASURE_FOR {
        expect_out(&mut vcpu, PORT_BATCH)?;
        batches += 1;
        // Also in between: a parent that stops waiting still knows the speed.
        if batches == 1 {
            speed(1, started.elapsed());
        }
    }
    speed(batches, started.elapsed());

    // SAFETY: both are labels of the assembly above, whose addresses alone are used.
    let offset = unsafe {
        (&raw const rethaw_probe_kernel).offset_from(&raw const rethaw_probe_loop) as u64
    };
    start_at(&vcpu, CODE + offset)?;
    expect_out(&mut vcpu, PORT_DONE)?;
    step(&serde_json::json!({ "step": "kernel_instructions" }));
    Ok(())
}

fn speed(batches: u64, took: Duration) {
    step(&serde_json::json!({
        "step": "speed",
        "instructions": batches * INSTRUCTIONS_PER_BATCH,
        "micros": took.as_micros() as u64,
    }));
}

fn step(value: &serde_json::Value) {
    use std::io::Write;
    let mut out = std::io::stdout();
    // A parent that is gone needs no answer.
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

/// Runs until the guest writes to `port`; anything else is a KVM that does not do its work.
fn expect_out(vcpu: &mut VcpuFd, port: u16) -> Result<(), String> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(p, _)) if p == port => return Ok(()),
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => return Err(format!("the guest stopped with {exit:?}")),
            Err(e) if e.errno() == nix::libc::EINTR || e.errno() == nix::libc::EAGAIN => {}
            Err(e) => return Err(format!("KVM_RUN: {e}")),
        }
    }
}

/// Memory with identity page tables and the code in it.
fn guest_memory() -> Result<NonNull<u8>, String> {
    let length = std::num::NonZeroUsize::new(MEMORY).ok_or("no memory")?;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new private mapping, chosen by the kernel; nobody else knows it.
    let memory = unsafe { mmap_anonymous(None, length, prot, MapFlags::MAP_PRIVATE) }
        .map_err(|e| format!("cannot map {MEMORY} bytes: {e}"))?
        .cast::<u8>();
    let put = |at: u64, value: u64| {
        // SAFETY: every `at` used here is 8-aligned and below MEMORY.
        unsafe { memory.add(at as usize).cast::<u64>().write(value) };
    };
    // Present and writable; the last level is one page of 2 MiB.
    put(PML4, PDPT | 3);
    put(PDPT, PD | 3);
    put(PD, 0x83);
    // SAFETY: the labels are in this order in one section, and what is between them is a few dozen
    // bytes; CODE and what follows is inside the mapping.
    unsafe {
        let begin = &raw const rethaw_probe_loop;
        let length = (&raw const rethaw_probe_end).offset_from(begin) as usize;
        std::ptr::copy_nonoverlapping(begin, memory.add(CODE as usize).as_ptr(), length);
    }
    Ok(memory)
}

/// Puts the vCPU into 64-bit mode at CPL 0, at the loop.
fn long_mode(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), String> {
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| format!("KVM_GET_SUPPORTED_CPUID: {e}"))?;
    vcpu.set_cpuid2(&cpuid).map_err(|e| format!("KVM_SET_CPUID2: {e}"))?;
    let mut sregs = vcpu.get_sregs().map_err(|e| format!("KVM_GET_SREGS: {e}"))?;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8,
        type_: 11,
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { type_: 3, selector: 16, db: 1, l: 0, ..code };
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5; // PAE
    sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 31; // PE MP ET NE PG
    sregs.efer = 1 << 8 | 1 << 10; // LME LMA
    vcpu.set_sregs(&sregs).map_err(|e| format!("KVM_SET_SREGS: {e}"))?;
    start_at(vcpu, CODE)
}

fn start_at(vcpu: &VcpuFd, rip: u64) -> Result<(), String> {
    let regs = kvm_regs { rip, rsp: 0x7000, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(|e| format!("KVM_SET_REGS: {e}"))
}
