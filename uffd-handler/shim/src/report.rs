//! Messages from inside QEMU, and the end of it.

use std::fmt::Write;

/// Text on the stack: nothing may be allocated in the middle of somebody else's `mmap`.
pub(crate) struct Text {
    bytes: [u8; 512],
    len: usize,
}

impl Text {
    pub(crate) fn new() -> Self {
        Self { bytes: [0; 512], len: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.len + text.len();
        self.bytes.get_mut(self.len..end).ok_or(std::fmt::Error)?.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

/// The errno of the last call of this thread.
pub(crate) fn errno() -> i32 {
    // SAFETY: always a valid pointer to this thread's own number.
    unsafe { *libc::__errno_location() }
}

/// Says why and ends QEMU, without running anything of its own on the way out.
pub(crate) fn die(what: &str, errno: i32) -> ! {
    let mut text = Text::new();
    // Cut off when it is too long, which is better than not said.
    let _ = match errno {
        0 => writeln!(text, "rethaw-uffd-shim: {what}"),
        errno => writeln!(text, "rethaw-uffd-shim: {what}: errno {errno}"),
    };
    // SAFETY: the buffer is as long as said; `_exit` does not return.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.bytes().as_ptr().cast(), text.bytes().len());
        libc::_exit(1)
    }
}
