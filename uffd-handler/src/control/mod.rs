//! The channel between the service and its page server: packets of JSON with descriptors beside
//! them, over a `SOCK_SEQPACKET` unix socket.

mod channel;
mod protocol;

pub use channel::{Channel, ChannelError, connect, listen};
pub use protocol::{
    Attachment, Event, FromPager, PROTOCOL_VERSION, Registration, Reply, Request, ToPager,
    VmSummary,
};
