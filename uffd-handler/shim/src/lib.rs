//! Preload shim for QEMU.
