//! What service and page server say to each other.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

use crate::region::Region;
use crate::source::LayerFiles;

/// Changes whenever a message or the shared state changes its meaning.
pub const PROTOCOL_VERSION: u32 = 3;

/// Everything a page server has to know about a VM, beside its descriptors. These come in this
/// order: userfaultfd, handshake socket (or pidfd), shared state, then what
/// [`Registration::attachments`] names.
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
    /// The request of a user that it was made or claimed for, for messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
}

/// What a descriptor of a registration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment<'a> {
    /// An open file.
    File(&'a Path),
    /// A key, in memory; see [`crate::seal::Key::to_descriptor`].
    Key(&'a str),
}

impl Registration {
    /// Descriptors before the attachments.
    pub const FIXED_FDS: usize = 3;

    /// What the descriptors after the first three are: the files of every layer (bottom first, each
    /// in the order of [`LayerFiles::paths`], then its key if it has one), then the working set.
    pub fn attachments(&self) -> impl Iterator<Item = Attachment<'_>> {
        fn of(layer: &LayerFiles) -> impl Iterator<Item = Attachment<'_>> {
            let files = layer.paths().into_iter().map(Attachment::File);
            files.chain(layer.key().map(Attachment::Key))
        }
        let working_set = self.working_set.as_deref().map(Attachment::File);
        self.layers.iter().flat_map(of).chain(working_set)
    }

    /// Descriptors that belong to it.
    pub fn fd_count(&self) -> usize {
        Self::FIXED_FDS + self.attachments().count()
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
        /// The request of a user that it goes for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        request: Option<String>,
    },
    /// Name the request that a VM is used for from now on.
    Claim {
        /// Which.
        id: String,
        /// The request.
        request: String,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// As an earlier version wrote VMs down: they are to be recovered after an upgrade.
    const OLD: &str = r#"{"id":"a","memory_bytes":4096,"regions":[],"peer_pid":1,"layers":[],
        "working_set":null,"graduate_after_millis":null}"#;

    #[test]
    fn a_registration_without_a_request_is_as_it_was() {
        let mut registration: Registration = serde_json::from_str(OLD).unwrap();
        assert_eq!(registration.request, None);
        let old: serde_json::Value = serde_json::from_str(OLD).unwrap();
        assert_eq!(serde_json::to_value(&registration).unwrap(), old);
        registration.request = Some("r".into());
        assert_eq!(serde_json::to_value(&registration).unwrap()["request"], "r");
    }
}
