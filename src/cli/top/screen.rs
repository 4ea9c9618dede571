//! The terminal: its other screen, for as long as the picture is shown.

use std::io::IsTerminal;

use tokio::sync::mpsc;

use crate::cli::output;
use crate::cli::shell::terminal::{self, Raw, Size};

const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[2J";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// The other screen; dropping it brings back what was there before.
pub struct Screen {
    // Without a terminal to read from there are no keys, and signals end the program.
    keys: Option<(mpsc::Receiver<Vec<u8>>, Raw)>,
}

impl Screen {
    /// Switches to it.
    pub fn enter() -> anyhow::Result<Self> {
        let keys = if std::io::stdin().is_terminal() {
            let raw = Raw::enter()?;
            Some((terminal::keys(), raw))
        } else {
            None
        };
        let screen = Self { keys };
        output::write(ENTER.as_bytes())?;
        Ok(screen)
    }

    /// How much fits.
    pub fn size(&self) -> Size {
        terminal::size_of_output()
    }

    /// Draws over what is there.
    pub fn draw(&self, picture: &str) -> anyhow::Result<()> {
        let mut text = String::from("\x1b[H");
        let rows = usize::from(self.size().rows);
        let lines: Vec<&str> = picture.lines().take(rows).collect();
        // In raw mode a line feed does not return to the margin; after the last line it would
        // scroll.
        text.push_str(&lines.join("\x1b[K\r\n"));
        text.push_str("\x1b[K\x1b[J");
        output::write(text.as_bytes())
    }

    /// Resolves when the user wants to leave.
    pub async fn quit(&mut self) {
        let Some((keys, _)) = &mut self.keys else {
            return std::future::pending().await;
        };
        while let Some(typed) = keys.recv().await {
            // q, Ctrl-C, Ctrl-D
            if typed.iter().any(|key| matches!(key, b'q' | b'Q' | 3 | 4)) {
                return;
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // There is nobody left to be told that this failed.
        let _ = output::write(LEAVE.as_bytes());
    }
}
