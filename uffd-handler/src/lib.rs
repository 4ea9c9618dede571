//! Page server for lazily restored microVM memory.
