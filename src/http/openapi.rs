//! The OpenAPI document: made from the handlers, served at `/v1/openapi.json`, and checked in as
//! `docs/openapi.json`.
//!
//! To put a route into it, write `#[utoipa::path(...)]` above its handler, with a `tag`, an
//! `operation_id` and the answers that are its own, and add it to the router with
//! `.routes(routes!(handler))`. Answers of status 400 and above need a description only (which
//! `error_code` it is), and those that any operation can give are not to be named: body and headers
//! of refusals are added here. Then renew the file: `RETHAW_BLESS=1 cargo test -p rethaw openapi`.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::IntoResponse;
use serde_json::{Map, Value, json};
use utoipa::OpenApi;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, Object, ObjectBuilder, Schema, Type,
};

use super::error::Problem;

/// What is said once for all operations.
#[derive(Debug, OpenApi)]
#[openapi(
    info(
        title = "rethaw",
        description = "Warm microVM sandboxes. Errors are problem+json with `error_code`, one of \
            a closed list; every reply carries `X-Request-Id`; replies that made a VM work carry \
            its phases in `Server-Timing`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    tags(
        (name = "sandboxes", description = "Sandboxes and what happens in them"),
        (name = "templates", description = "What sandboxes are made from"),
        (name = "pools", description = "How many VMs wait"),
        (name = "keys", description = "Who may ask, for what, and for how much"),
        (name = "service", description = "The service itself"),
    ),
    components(schemas(Problem)),
)]
pub struct Head;

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let mut text = serde_json::to_string_pretty(&document()).unwrap_or_default();
    text.push('\n');
    text
});

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", tag = "service", operation_id = "get_openapi",
    responses((status = 200, description = "The OpenAPI document", body = Object,
        content_type = "application/json")))]
pub async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.as_str())
}

/// The document as JSON.
fn document() -> Value {
    let mut document =
        serde_json::to_value(super::routes(|v1| v1).into_openapi()).unwrap_or_default();
    document["security"] = json!([{"bearer": []}, {"api_key": []}]);
    document["components"]["securitySchemes"] = json!({
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key"},
        "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key",
            "description": "The same key"},
    });
    document["components"]["headers"] = json!({
        "RequestId": {
            "description": "Names the request in the service's log; a harmless one that came \
                with the request is kept",
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
        },
        "RetryAfter": {
            "description": "Seconds until it is worth trying again",
            "schema": {"type": "integer", "minimum": 0},
        },
    });
    for (status, name, description) in COMMON.iter().chain(WITH_BODY) {
        let mut response = json!({"description": description});
        complete_response(status, &mut response);
        document["components"]["responses"][name] = response;
    }
    for (path, operations) in document["paths"].as_object_mut().into_iter().flatten() {
        for operation in operations.as_object_mut().into_iter().flat_map(Map::values_mut) {
            complete(path, operation);
        }
    }
    document
}

/// Whether a route answers without a key.
fn is_public(path: &str) -> bool {
    !path.starts_with("/v1/") || path == "/v1/openapi.json"
}

/// Refusals that any operation with a key can give.
const COMMON: &[(&str, &str, &str)] = &[
    ("400", "Malformed", "`malformed_request`"),
    ("401", "Unauthorized", "`unauthorized`"),
    ("403", "Forbidden", "`forbidden`: the key lacks the scope"),
    ("404", "NotFound", "Nothing of that name"),
    ("422", "Invalid", "`invalid_field`"),
    ("429", "TooMany", "`quota_exceeded`, `too_many_claims`; see `Retry-After`"),
    ("500", "Failed", "`state_store_failed`"),
    ("503", "Unavailable", "Not now; see `Retry-After`"),
];

/// Refusals of operations that take a body.
const WITH_BODY: &[(&str, &str, &str)] = &[("413", "TooLong", "`body_too_long`")];

fn complete(path: &str, operation: &mut Value) {
    let takes_body = operation.get("requestBody").is_some();
    if is_public(path) {
        operation["security"] = json!([]);
    }
    let Some(responses) = operation["responses"].as_object_mut() else { return };
    for (status, response) in responses.iter_mut() {
        complete_response(status, response);
    }
    let with_body = if takes_body { WITH_BODY } else { &[] };
    let common = if is_public(path) { &[] } else { COMMON };
    for (status, name, _) in common.iter().chain(with_body) {
        let shared = json!({"$ref": format!("#/components/responses/{name}")});
        responses.entry(*status).or_insert(shared);
    }
}

fn complete_response(status: &str, response: &mut Value) {
    response["headers"]["X-Request-Id"] = json!({"$ref": "#/components/headers/RequestId"});
    if status < "400" || response.get("content").is_some() {
        return;
    }
    if ["429", "503"].contains(&status) {
        response["headers"]["Retry-After"] = json!({"$ref": "#/components/headers/RetryAfter"});
    }
    let schema = json!({"$ref": "#/components/schemas/Problem"});
    response["content"] = json!({"application/problem+json": {"schema": schema}});
}

/// Text that can be an argument or a variable's value in the guest.
fn no_nul() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String).pattern(Some(r"^[^\x00]*$"))
}

/// Schema of environment variables.
pub fn env_schema() -> Object {
    let name = ObjectBuilder::new().schema_type(Type::String).pattern(Some(r"^[^=\x00]+$")).build();
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .description(Some("Environment variables"))
        .property_names(Some(Schema::Object(name)))
        .additional_properties(Some(AdditionalProperties::RefOr(no_nul().build().into())))
        .build()
}

/// Schema of a command and its arguments.
pub fn argv_schema() -> utoipa::openapi::schema::Array {
    let program = ObjectBuilder::new()
        .schema_type(Type::String)
        .min_length(Some(1))
        .pattern(Some(r"^[^\x00]+$"));
    ArrayBuilder::new()
        .description(Some("Program and arguments; the program is looked up in `PATH`"))
        .prefix_items([Schema::Object(program.build())])
        .items(no_nul())
        .min_items(Some(1))
        .build()
}

/// Schema of a sandbox's metadata.
pub fn metadata_schema() -> Object {
    let text = |min, max| {
        let text = ObjectBuilder::new().schema_type(Type::String).max_length(Some(max));
        text.min_length(Some(min)).build()
    };
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .description(Some("Labels of the user's own; `name` is one that the command line knows"))
        .max_properties(Some(super::sandboxes::MAX_METADATA_ENTRIES))
        .property_names(Some(Schema::Object(text(1, super::sandboxes::MAX_METADATA_KEY))))
        .additional_properties(Some(AdditionalProperties::RefOr(
            text(0, super::sandboxes::MAX_METADATA_VALUE).into(),
        )))
        .build()
}

/// Schema of the `metadata.KEY=VALUE` filters: each property of the object is a parameter.
pub fn filters_schema() -> Object {
    let name = ObjectBuilder::new().schema_type(Type::String).pattern(Some(r"^metadata\."));
    let value = ObjectBuilder::new().schema_type(Type::String).build();
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .property_names(Some(Schema::Object(name.build())))
        .additional_properties(Some(AdditionalProperties::RefOr(value.into())))
        .build()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Routes that are on purpose not in the document, by their beginning, and why.
    const ELSEWHERE: &[(&str, &str)] = &[];

    fn operations(document: &Value) -> Vec<(String, &Value)> {
        let paths = document["paths"].as_object().unwrap();
        let all = paths.iter().flat_map(|(path, operations)| {
            let operations = operations.as_object().unwrap();
            operations.iter().map(move |(method, o)| (format!("{method} {path}"), o))
        });
        all.collect()
    }

    #[test]
    fn checked_in_document_is_that_of_the_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
        if std::env::var_os("RETHAW_BLESS").is_some() {
            std::fs::write(path, DOCUMENT.as_str()).unwrap();
        }
        let checked_in = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            checked_in == *DOCUMENT,
            "docs/openapi.json is not what the code says; renew it with \
             `RETHAW_BLESS=1 cargo test -p rethaw openapi` and look at the difference"
        );
    }

    #[test]
    fn every_route_is_documented() {
        let router = format!("{:?}", super::super::routes(|v1| v1).split_for_parts().0);
        // The router shows its routes in no other way; `/` is always there, in its fallback.
        let routes: BTreeSet<&str> = router
            .split('"')
            .filter(|text| text.starts_with('/') && *text != "/" && !text.contains("__private"))
            .collect();
        assert!(routes.contains("/v1/sandboxes/{id}"), "cannot read the router: {router}");
        let document = document();
        let undocumented: Vec<_> = routes
            .into_iter()
            .filter(|route| document["paths"].get(route).is_none())
            .filter(|route| !ELSEWHERE.iter().any(|(start, _)| route.starts_with(start)))
            .collect();
        assert!(
            undocumented.is_empty(),
            "routes without #[utoipa::path]: {undocumented:#?}; see src/http/openapi.rs"
        );
    }

    #[test]
    fn operations_can_be_told_apart_and_say_what_they_do() {
        let document = document();
        let mut ids = BTreeSet::new();
        for (name, operation) in operations(&document) {
            let id = operation["operationId"].as_str().unwrap_or_default().to_owned();
            assert!(ids.insert(id.clone()), "{name}: operation_id {id:?} is taken");
            assert!(!operation["tags"].as_array().unwrap().is_empty(), "{name}: no tag");
            let summary = operation["summary"].as_str().unwrap_or_default();
            assert!(!summary.is_empty() && !summary.ends_with('.'), "{name}: {summary:?}");
            for (status, response) in operation["responses"].as_object().unwrap() {
                let named = response["description"].is_string() || response["$ref"].is_string();
                assert!(named, "{name}: {status}");
            }
        }
    }
}
