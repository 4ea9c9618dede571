//! What service and page server say to each other.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

use crate::region::Region;
use crate::source::LayerFiles;

/// Changes whenever a message or the shared state changes its meaning.
pub const PROTOCOL_VERSION: u32 = 2;

/// Everything a page server has to know about a VM, beside its descriptors. These come in this
/// order: userfaultfd, handshake socket (or pidfd), shared state, then the files of every layer
/// (bottom first, each in the order of [`LayerFiles::paths`]), then the working set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// The service's name for the VM.
    pub id: String,
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// Where it lies in the VMM.
    pub regions: Vec<Region>,
    /// The VMM's process, for messages.
    pub peer_pid: i32,
    /// Layers of its memory, bottom first; the paths are for messages, files come open.
    pub layers: Vec<LayerFiles>,
    /// Path of the working set, when one comes along.
    pub working_set: Option<PathBuf>,
    /// Whether to put all pages in place in the end, and how long after the start.
    pub graduate_after_millis: Option<u64>,
}

impl Registration {
    /// Descriptors that belong to it.
    pub fn fd_count(&self) -> usize {
        let files: usize = self.layers.iter().map(|layer| layer.paths().len()).sum();
        3 + files + usize::from(self.working_set.is_some())
    }
}

/// What the service asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum Request {
    /// First message on a connection.
    Hello {
        /// [`PROTOCOL_VERSION`] of the service.
        version: u32,
    },
    /// Proof of life.
    Ping,
    /// Serve a VM from now on; also after another page server did.
    AddVm(Registration),
    /// Stop serving a VM.
    RemoveVm {
        /// Which.
        id: String,
    },
    /// Put all of a VM's pages in place from now on.
    Graduate {
        /// Which.
        id: String,
    },
    /// Name all VMs.
    List,
    /// Send back a VM's registration and descriptors, and go on serving it.
    Describe {
        /// Which.
        id: String,
    },
    /// End the process.
    Shutdown,
}

/// A VM as the page server has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSummary {
    /// The service's name for it.
    pub id: String,
    /// Why it is not served any more.
    pub lost: Option<String>,
}

/// Answers to requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Reply {
    /// Done.
    Done,
    /// To `Hello`.
    Hello {
        /// [`PROTOCOL_VERSION`] of the page server.
        version: u32,
        /// Its process id.
        pid: i32,
    },
    /// To `List`.
    Vms {
        /// All of them.
        items: Vec<VmSummary>,
    },
    /// To `Describe`; the descriptors come along.
    Vm(Registration),
    /// The request failed.
    Failed {
        /// Why.
        message: String,
    },
}

/// What a page server says unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// The VMM ended; everything about it is freed.
    VmGone {
        /// Which.
        id: String,
    },
    /// A page of the VM cannot be served. The VM stands still and must be killed.
    VmLost {
        /// Which.
        id: String,
        /// Why.
        reason: String,
    },
    /// Every page is in place; the VM no longer needs a page server.
    Graduated {
        /// Which.
        id: String,
    },
}

/// A packet to the page server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ToPager {
    /// Number that the reply repeats.
    pub number: u64,
    /// The request.
    pub request: Request,
}

/// A packet from the page server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromPager {
    /// An answer.
    Reply {
        /// Number of the request.
        number: u64,
        /// The answer.
        reply: Reply,
    },
    /// An event.
    Event(Event),
}
