//! This process's own terminal: its size, its raw mode, its keys.

use std::io::{IsTerminal, Read};

use anyhow::Context as _;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde::Serialize;
use tokio::sync::mpsc;

/// Key presses on their way; a paste that is longer waits in the terminal.
const KEYS_IN_FLIGHT: usize = 16;

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// The size of the terminal, which has to be one.
pub fn size() -> anyhow::Result<Size> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        anyhow::bail!("shell needs a terminal; for scripts there is `rethaw exec`");
    }
    let size = tcgetwinsize(std::io::stdout()).context("cannot ask the terminal for its size")?;
    Ok(usual(size.ws_col, size.ws_row))
}

/// The size of what standard output goes to.
pub fn size_of_output() -> Size {
    let size = tcgetwinsize(std::io::stdout()).ok();
    size.map_or(usual(0, 0), |size| usual(size.ws_col, size.ws_row))
}

/// A serial console says 0 by 0.
fn usual(cols: u16, rows: u16) -> Size {
    Size { cols: if cols == 0 { 80 } else { cols }, rows: if rows == 0 { 24 } else { rows } }
}

/// Raw mode, left again when this is dropped: on the way out of an error, too.
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// Passes every key on as it is typed; nothing is echoed or turned into a signal here.
    pub fn enter() -> anyhow::Result<Self> {
        let before = tcgetattr(std::io::stdin()).context("cannot read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw)
            .context("cannot switch the terminal to raw mode")?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // There is no other way back than this one.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// What is typed. The thread that reads it ends with the process: a read of a terminal cannot be
/// called off.
pub fn keys() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(KEYS_IN_FLIGHT);
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut buffer = [0_u8; 4096];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => {
                    if sender.blocking_send(buffer[..length].to_vec()).is_err() {
                        return;
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}
