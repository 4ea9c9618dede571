//! The body of every refusal, and the closed list of its codes.

use serde::{Deserialize, Serialize};

/// Body of any answer with a status of 400 or above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ErrorBody {
    /// One of [`codes`].
    pub error_code: String,
    /// For people; carries the values.
    pub message: String,
}

/// The agent's error codes.
pub mod codes {
    /// 400: the body or the query cannot be understood.
    pub const INVALID_REQUEST: &str = "invalid_request";
    /// 400: a path that is relative, has `.` or `..` in it, or a NUL byte.
    pub const INVALID_PATH: &str = "invalid_path";
    /// 400: an archive entry would land outside the folder it is unpacked to.
    pub const ENTRY_ESCAPES: &str = "entry_escapes";
    /// 404: no such endpoint.
    pub const NOT_FOUND: &str = "not_found";
    /// 404: no such file or folder.
    pub const FILE_NOT_FOUND: &str = "file_not_found";
    /// 404: no such process.
    pub const PROCESS_NOT_FOUND: &str = "process_not_found";
    /// 405: the endpoint exists, the method does not.
    pub const METHOD_NOT_ALLOWED: &str = "method_not_allowed";
    /// 408: the guest had not booted within the time given.
    pub const BOOT_TIMEOUT: &str = "boot_timeout";
    /// 409: settled or frozen and not yet brought back.
    pub const IDENTITY_PENDING: &str = "identity_pending";
    /// 409: an identity item failed; this VM must be destroyed.
    pub const IDENTITY_FAILED: &str = "identity_failed";
    /// 409: the call does not fit the state, for example an identity for a live VM.
    pub const WRONG_STATE: &str = "wrong_state";
    /// 409: a folder where a file is needed.
    pub const IS_A_DIRECTORY: &str = "is_a_directory";
    /// 409: a device, socket or pipe where a regular file is needed.
    pub const NOT_A_FILE: &str = "not_a_file";
    /// 409: a file where a folder is needed.
    pub const NOT_A_DIRECTORY: &str = "not_a_directory";
    /// 409: the target exists already.
    pub const ALREADY_EXISTS: &str = "already_exists";
    /// 413: a body larger than the endpoint takes.
    pub const BODY_TOO_LARGE: &str = "body_too_large";
    /// 403: the file system or the user's rights forbid it.
    pub const PERMISSION_DENIED: &str = "permission_denied";
    /// 422: no such program.
    pub const PROGRAM_NOT_FOUND: &str = "program_not_found";
    /// 422: the program is there and cannot be run.
    pub const PROGRAM_NOT_EXECUTABLE: &str = "program_not_executable";
    /// 422: no such user.
    pub const USER_NOT_FOUND: &str = "user_not_found";
    /// 422: the working directory is not there or is no directory.
    pub const CWD_NOT_FOUND: &str = "cwd_not_found";
    /// 422: an empty command, a NUL byte, a bad variable name, an unknown signal.
    pub const INVALID_COMMAND: &str = "invalid_command";
    /// 429: too many commands at once.
    pub const TOO_MANY_PROCESSES: &str = "too_many_processes";
    /// 404: no such watcher.
    pub const WATCHER_NOT_FOUND: &str = "watcher_not_found";
    /// 422: changes on a network file system may go unseen.
    pub const NETWORK_FILE_SYSTEM: &str = "network_file_system";
    /// 429: too many folders are watched.
    pub const TOO_MANY_WATCHES: &str = "too_many_watches";
    /// 502: nothing listens on the guest's port.
    pub const PORT_NOT_OPEN: &str = "port_not_open";
    /// 507: the guest's disk is full.
    pub const DISK_FULL: &str = "disk_full";
    /// 500: anything else; the message says what.
    pub const INTERNAL: &str = "internal";
}
