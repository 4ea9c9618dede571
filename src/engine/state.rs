//! The states of a sandbox, and every way from one to another.
//!
//! ```text
//!            Pause, Fork             Written
//! running ----------------> pausing ---------> paused <--------+
//!    ^  ^                      |                 | Resume      | Failed
//!    |  +------- Thawed -------+                 v             |
//!    +------------------- Revived ----------- resuming --------+
//!
//! any but deleting --Delete--> deleting
//! ```
//!
//! A fork passes through `pausing` because its source stands still for as long. Nothing else in the
//! service decides what may follow what: a sandbox changes its state through
//! [`State::after`] only, and what is not in the table is refused with the state it is in.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The states a user sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = SandboxState)]
pub enum State {
    /// Commands run.
    Running,
    /// On its way to disk.
    Pausing,
    /// On disk, memory freed.
    Paused,
    /// On its way back.
    Resuming,
    /// Being removed.
    Deleting,
}

impl State {
    /// Its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Deleting => "deleting",
        }
    }

    /// The state after an event; `None` when the event cannot happen in this one.
    pub fn after(self, event: Event) -> Option<Self> {
        match (self, event) {
            (Self::Running, Event::Pause | Event::Fork) => Some(Self::Pausing),
            (Self::Pausing, Event::Written) => Some(Self::Paused),
            (Self::Pausing, Event::Thawed) | (Self::Resuming, Event::Revived) => {
                Some(Self::Running)
            }
            (Self::Paused, Event::Resume) => Some(Self::Resuming),
            (Self::Resuming, Event::Failed) => Some(Self::Paused),
            (Self::Running | Self::Pausing | Self::Paused | Self::Resuming, Event::Delete) => {
                Some(Self::Deleting)
            }
            _ => None,
        }
    }
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It is to be paused.
    Pause,
    /// Clones of it are to be made.
    Fork,
    /// It is on disk, and its VM is gone.
    Written,
    /// It was not given up: a pause that failed, or a fork that has what it needs.
    Thawed,
    /// It is to run again.
    Resume,
    /// It runs again.
    Revived,
    /// It could not be brought back and stays on disk.
    Failed,
    /// It is to be removed.
    Delete,
}

impl Event {
    /// What was asked for, in words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Fork => "fork",
            Self::Written => "the end of a pause",
            Self::Thawed => "the end of a stop",
            Self::Resume => "resume",
            Self::Revived | Self::Failed => "the end of a resume",
            Self::Delete => "delete",
        }
    }

    /// The state it needs, in words.
    pub fn wanted(self) -> &'static str {
        match self {
            Self::Pause | Self::Fork => State::Running.as_str(),
            Self::Written | Self::Thawed => State::Pausing.as_str(),
            Self::Resume => State::Paused.as_str(),
            Self::Revived | Self::Failed => State::Resuming.as_str(),
            Self::Delete => "there",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Event::{Delete, Failed, Fork, Pause, Resume, Revived, Thawed, Written};
    use State::{Deleting, Paused, Pausing, Resuming, Running};

    const STATES: [State; 5] = [Running, Pausing, Paused, Resuming, Deleting];
    const EVENTS: [Event; 8] = [Pause, Fork, Written, Thawed, Resume, Revived, Failed, Delete];
    /// Every transition there is; one that is not here must be refused.
    const TABLE: [(State, Event, State); 11] = [
        (Running, Pause, Pausing),
        (Running, Fork, Pausing),
        (Pausing, Written, Paused),
        (Pausing, Thawed, Running),
        (Paused, Resume, Resuming),
        (Resuming, Revived, Running),
        (Resuming, Failed, Paused),
        (Running, Delete, Deleting),
        (Pausing, Delete, Deleting),
        (Paused, Delete, Deleting),
        (Resuming, Delete, Deleting),
    ];

    #[test]
    fn the_table_is_all_there_is() {
        for state in STATES {
            for event in EVENTS {
                let row = TABLE.iter().find(|row| (row.0, row.1) == (state, event));
                assert_eq!(state.after(event), row.map(|row| row.2), "{state:?} {event:?}");
            }
        }
    }

    #[test]
    fn nothing_leaves_deleting_and_everything_can_get_there() {
        assert!(EVENTS.iter().all(|event| Deleting.after(*event).is_none()));
        for state in STATES.into_iter().filter(|state| *state != Deleting) {
            assert_eq!(state.after(Delete), Some(Deleting));
        }
    }

    #[test]
    fn a_refusal_names_a_state_in_which_it_would_be_granted() {
        for event in EVENTS.into_iter().filter(|event| *event != Delete) {
            let named = STATES.into_iter().find(|state| state.as_str() == event.wanted());
            assert!(named.and_then(|state| state.after(event)).is_some(), "{event:?}");
        }
    }
}
