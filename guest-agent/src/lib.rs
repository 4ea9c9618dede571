//! Wire types, stream session and client for the guest agent.
