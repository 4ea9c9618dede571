//! What a route asks of the key that comes with a request: a pure table, so that a route nobody
//! thought of is closed to all but `admin`.

use axum::http::Method;

use crate::engine::keys::Scope;

/// What it takes to use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Any key.
    AnyKey,
    /// A key with this scope.
    Scope(Scope),
    /// A key that may use sandboxes, whosever they are.
    SomeSandboxes,
    /// A key that may use the sandbox in the path.
    Sandbox,
    /// The same, or the sandbox's own access token.
    SandboxOrToken,
}

/// Parts of a sandbox that its access token opens: what happens in it, not what becomes of it.
const INSIDE: &[&str] =
    &["exec", "files", "pty", "dir", "stat", "move", "watch", "processes", "ports"];

/// What `route`, as the router knows it, asks for. Both faces of the API are built alike, so that
/// what stands before the resource's name does not matter.
pub fn need(method: &Method, route: &str) -> Need {
    let mut parts = route.split('/').filter(|part| !part.is_empty());
    let reads = [Method::GET, Method::HEAD].contains(method);
    let resource = parts.find(|part| !["v1", "v2", "e2b"].contains(part)).unwrap_or_default();
    let inside = parts.nth(1);
    match resource {
        "sandboxes" => match (route.contains("/{"), inside) {
            (false, _) if reads => Need::SomeSandboxes,
            (false, _) => Need::Scope(Scope::Sandboxes),
            (true, Some(part)) if INSIDE.contains(&part) => Need::SandboxOrToken,
            (true, _) => Need::Sandbox,
        },
        "keys" => Need::Scope(Scope::Admin),
        // They show what every key does.
        "events" | "stats" => Need::Scope(Scope::AllSandboxes),
        _ if reads => Need::AnyKey,
        "templates" | "inputs" => Need::Scope(Scope::Templates),
        "pools" => Need::Scope(Scope::Pools),
        _ => Need::Scope(Scope::Admin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_ask_for_what_they_do() {
        for (method, route, wanted) in [
            ("GET", "/v1/info", Need::AnyKey),
            ("GET", "/v1/templates/{name}", Need::AnyKey),
            ("POST", "/v1/templates", Need::Scope(Scope::Templates)),
            ("DELETE", "/v1/templates/{name}", Need::Scope(Scope::Templates)),
            ("PUT", "/v1/inputs/{sha256}", Need::Scope(Scope::Templates)),
            ("GET", "/v1/events", Need::Scope(Scope::AllSandboxes)),
            ("PUT", "/v1/pools/{template}", Need::Scope(Scope::Pools)),
            ("GET", "/v1/pools", Need::AnyKey),
            ("GET", "/v1/keys", Need::Scope(Scope::Admin)),
            ("GET", "/v1/sandboxes", Need::SomeSandboxes),
            ("POST", "/v2/sandboxes", Need::Scope(Scope::Sandboxes)),
            ("POST", "/e2b/v2/sandboxes", Need::Scope(Scope::Sandboxes)),
            ("GET", "/v1/sandboxes/{id}", Need::Sandbox),
            ("POST", "/sandboxes/{id}/pause", Need::Sandbox),
            ("POST", "/v1/sandboxes/{id}/exec", Need::SandboxOrToken),
            ("DELETE", "/v1/sandboxes/{id}/files", Need::SandboxOrToken),
            ("GET", "/v1/sandboxes/{id}/pty", Need::SandboxOrToken),
            ("POST", "/v1/anything-new", Need::Scope(Scope::Admin)),
            ("DELETE", "", Need::Scope(Scope::Admin)),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            assert_eq!(need(&method, route), wanted, "{method} {route}");
        }
    }
}
