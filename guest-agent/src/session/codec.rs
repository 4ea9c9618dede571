//! Run-length stuffing: data never holds sixteen 0xFF in a row, so sixteen of them can mean
//! "everything before this is void".
//!
//! Data: after 15 consecutive 0xFF the writer inserts one 0x00, which the reader drops.
//! Marker: 16 or more 0xFF, then 0x01 (or 0x02, from an agent that takes a question before HTTP/2),
//! then a 16-byte nonce whose bytes are all below 0x80.
//!
//! Reader states: `Lost` (skipping to the next marker) -> `Skip` (in a marker's 0xFF) -> `Nonce`
//! -> `Data`; anything malformed leads to `Lost`, and from every state a marker is recognised.

/// Longest run of 0xFF inside data.
const MAX_RUN: u8 = 15;
/// Bytes of 0xFF a marker is written with; the reader takes any number from 16 on.
const MARKER_RUN: usize = 16;
const STUFFING: u8 = 0x00;
const MARKER_END: u8 = 0x01;
/// The same, from an agent that takes a question before HTTP/2.
const MARKER_END_ASK: u8 = 0x02;

/// Length of a marker on the wire.
pub const MARKER_LEN: usize = MARKER_RUN + 1 + 16;

/// Name of a session, chosen by the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce([u8; 16]);

impl Nonce {
    /// What an agent that has just started sends of its own accord.
    pub const HELLO: Self = Self([0; 16]);

    /// A nonce of these random bytes. The top bit of each is cleared, so that a nonce cut short by
    /// another marker can be told from that marker; one bit is set, so that it is never `HELLO`.
    pub fn from_random(mut bytes: [u8; 16]) -> Self {
        for byte in &mut bytes {
            *byte &= 0x7f;
        }
        bytes[0] |= 0x40;
        Self(bytes)
    }

    /// The marker that announces this nonce.
    pub fn marker(self) -> [u8; MARKER_LEN] {
        let mut out = [0xff; MARKER_LEN];
        out[MARKER_RUN] = MARKER_END;
        out[MARKER_RUN + 1..].copy_from_slice(&self.0);
        out
    }

    /// The marker by which an agent also says that it takes a question before HTTP/2.
    pub fn answer(self) -> [u8; MARKER_LEN] {
        let mut out = self.marker();
        out[MARKER_RUN] = MARKER_END_ASK;
        out
    }
}

/// The writer's half.
#[derive(Debug, Default)]
pub struct Encoder {
    run: u8,
}

/// What the writer should write next.
#[derive(Debug, PartialEq, Eq)]
pub enum Encode {
    /// This many bytes of the data can go out as they are.
    Plain(usize),
    /// One 0x00 that is not part of the data has to go out first.
    Stuff,
}

impl Encoder {
    /// Decides what may be written of `data`, which must not be empty.
    pub fn next(&self, data: &[u8]) -> Encode {
        if self.run == MAX_RUN {
            return Encode::Stuff;
        }
        let (mut run, mut at) = (self.run, 0);
        while let Some(offset) = memchr::memchr(0xff, &data[at..]) {
            if offset > 0 {
                run = 0;
            }
            at += offset;
            while at < data.len() && data[at] == 0xff {
                at += 1;
                run += 1;
                if run == MAX_RUN {
                    return Encode::Plain(at);
                }
            }
            run = if at < data.len() { 0 } else { run };
        }
        Encode::Plain(data.len())
    }

    /// Records that `data` went out.
    pub fn wrote(&mut self, data: &[u8]) {
        let tail = data.iter().rev().take_while(|b| **b == 0xff).count();
        self.run = if tail == data.len() { self.run + tail as u8 } else { tail as u8 };
    }

    /// Records that the stuffing byte, or a whole marker, went out.
    pub fn restart(&mut self) {
        self.run = 0;
    }

    /// The byte of [`Encode::Stuff`].
    pub const STUFFING: [u8; 1] = [STUFFING];
}

#[derive(Debug, Clone, Copy)]
enum State {
    Lost { run: u8 },
    Skip,
    Nonce { bytes: [u8; 16], len: usize, may_ask: bool },
    Data { run: u8 },
}

/// The reader's half. It starts lost: nothing before the first marker counts.
#[derive(Debug)]
pub struct Decoder {
    state: State,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { state: State::Lost { run: 0 } }
    }
}

/// Result of one [`Decoder::decode`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Bytes taken from the input.
    pub consumed: usize,
    /// Bytes of data put into the output.
    pub produced: usize,
    /// A marker was completed right before the unconsumed input; the data before it is void.
    pub marker: Option<Nonce>,
    /// Who sent that marker takes a question before HTTP/2.
    pub may_ask: bool,
}

impl Decoder {
    /// Whether data is being read, as opposed to a marker being looked for or read.
    pub fn in_data(&self) -> bool {
        matches!(self.state, State::Data { .. })
    }

    /// Decodes until the input is used up, the output is full, or a marker ends.
    pub fn decode(&mut self, input: &[u8], out: &mut [u8]) -> Step {
        let mut step = Step::default();
        while step.consumed < input.len() {
            let rest = &input[step.consumed..];
            match &mut self.state {
                State::Data { run } => {
                    let before = (step.consumed, step.produced);
                    let next = data(run, rest, &mut out[step.produced..], &mut step);
                    if let Some(next) = next {
                        self.state = next;
                    } else if before == (step.consumed, step.produced) {
                        break; // the output is full
                    }
                }
                State::Lost { run } => {
                    if *run == 0 {
                        let Some(at) = memchr::memchr(0xff, rest) else {
                            step.consumed = input.len();
                            break;
                        };
                        step.consumed += at;
                    }
                    *run = if input[step.consumed] == 0xff { *run + 1 } else { 0 };
                    step.consumed += 1;
                    if usize::from(*run) == MARKER_RUN {
                        self.state = State::Skip;
                    }
                }
                State::Skip => {
                    step.consumed += 1;
                    match rest[0] {
                        0xff => {}
                        end @ (MARKER_END | MARKER_END_ASK) => {
                            let may_ask = end == MARKER_END_ASK;
                            self.state = State::Nonce { bytes: [0; 16], len: 0, may_ask };
                        }
                        _ => self.state = State::Lost { run: 0 },
                    }
                }
                State::Nonce { bytes, len, may_ask } => {
                    step.consumed += 1;
                    if rest[0] >= 0x80 {
                        self.state = State::Lost { run: u8::from(rest[0] == 0xff) };
                        continue;
                    }
                    bytes[*len] = rest[0];
                    *len += 1;
                    if *len == bytes.len() {
                        step.marker = Some(Nonce(*bytes));
                        step.may_ask = *may_ask;
                        self.state = State::Data { run: 0 };
                        break;
                    }
                }
            }
        }
        step
    }
}

/// One stretch of data: up to the next 0xFF, or the run of them at the start.
fn data(run: &mut u8, rest: &[u8], out: &mut [u8], step: &mut Step) -> Option<State> {
    if rest[0] == 0xff {
        let ahead = rest.iter().take(MARKER_RUN).take_while(|b| **b == 0xff).count();
        if usize::from(*run) + ahead >= MARKER_RUN {
            // What of this run lies in the input is not handed out: it was never data.
            step.consumed += ahead;
            return Some(State::Skip);
        }
        let n = ahead.min(out.len());
        out[..n].fill(0xff);
        *run += n as u8;
        step.consumed += n;
        step.produced += n;
        return None;
    }
    if *run == MAX_RUN {
        step.consumed += 1;
        if rest[0] != STUFFING {
            return Some(State::Lost { run: 0 });
        }
        *run = 0;
        return None;
    }
    let limit = rest.len().min(out.len());
    let n = memchr::memchr(0xff, &rest[..limit]).unwrap_or(limit);
    out[..n].copy_from_slice(&rest[..n]);
    if n > 0 {
        *run = 0;
    }
    step.consumed += n;
    step.produced += n;
    None
}
