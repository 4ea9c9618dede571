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
    macro_rules! list {
        ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
            $($(#[$doc])* pub const $name: &str = $text;)*

            /// All of them.
            #[cfg(feature = "client")]
            pub const ALL: &[&str] = &[$($text),*];
        };
    }

    list! {
        /// 400: the body or the query cannot be understood.
        INVALID_REQUEST = "invalid_request";
        /// 400: a path that is relative, has `.` or `..` in it, or a NUL byte.
        INVALID_PATH = "invalid_path";
        /// 400: an archive entry would land outside the folder it is unpacked to.
        ENTRY_ESCAPES = "entry_escapes";
        /// 404: no such endpoint.
        NOT_FOUND = "not_found";
        /// 404: no such file or folder.
        FILE_NOT_FOUND = "file_not_found";
        /// 404: no such process.
        PROCESS_NOT_FOUND = "process_not_found";
        /// 405: the endpoint exists, the method does not.
        METHOD_NOT_ALLOWED = "method_not_allowed";
        /// 408: the guest had not booted within the time given.
        BOOT_TIMEOUT = "boot_timeout";
        /// 409: settled or frozen and not yet brought back.
        IDENTITY_PENDING = "identity_pending";
        /// 409: an identity item failed; this VM must be destroyed.
        IDENTITY_FAILED = "identity_failed";
        /// 409: the call does not fit the state, for example an identity for a live VM.
        WRONG_STATE = "wrong_state";
        /// 409: a folder where a file is needed.
        IS_A_DIRECTORY = "is_a_directory";
        /// 409: a device, socket or pipe where a regular file is needed.
        NOT_A_FILE = "not_a_file";
        /// 409: a file where a folder is needed.
        NOT_A_DIRECTORY = "not_a_directory";
        /// 409: the target exists already.
        ALREADY_EXISTS = "already_exists";
        /// 413: a body larger than the endpoint takes.
        BODY_TOO_LARGE = "body_too_large";
        /// 403: the file system or the user's rights forbid it.
        PERMISSION_DENIED = "permission_denied";
        /// 422: no such program.
        PROGRAM_NOT_FOUND = "program_not_found";
        /// 422: the program is there and cannot be run.
        PROGRAM_NOT_EXECUTABLE = "program_not_executable";
        /// 422: no such user.
        USER_NOT_FOUND = "user_not_found";
        /// 422: the working directory is not there or is no directory.
        CWD_NOT_FOUND = "cwd_not_found";
        /// 422: an empty command, a NUL byte, a bad variable name, an unknown signal.
        INVALID_COMMAND = "invalid_command";
        /// 429: too many commands at once.
        TOO_MANY_PROCESSES = "too_many_processes";
        /// 404: no such watcher.
        WATCHER_NOT_FOUND = "watcher_not_found";
        /// 422: changes on a network file system may go unseen.
        NETWORK_FILE_SYSTEM = "network_file_system";
        /// 429: too many folders are watched.
        TOO_MANY_WATCHES = "too_many_watches";
        /// 502: nothing listens on the guest's port.
        PORT_NOT_OPEN = "port_not_open";
        /// 507: the guest's disk is full.
        DISK_FULL = "disk_full";
        /// 500: anything else; the message says what.
        INTERNAL = "internal";
    }
}
