//! `/v1/sandboxes/{id}/network`: what a sandbox may reach and who may reach it, changeable while it
//! runs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type,
};

use super::App;
use super::error::ApiError;
use super::json::JsonBody;
use crate::engine::sandbox::{Sandbox, SandboxData};
use crate::net::policy::{Internet, Limits, MAX_DESTINATIONS, Policy};

/// A sandbox's network
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Network)]
pub struct NetworkView {
    /// Whether it has one
    attached: bool,
    /// Its address; of its last run while it is paused
    #[schema(value_type = Option<String>)]
    ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address, where the host can pass it on
    #[schema(value_type = Option<String>)]
    ipv6: Option<Ipv6Addr>,
    #[schema(schema_with = internet_schema)]
    internet: Internet,
    /// Most that passes in each direction
    network_limits: Limits,
    /// Ports that anybody may reach through the service, without a token
    #[schema(value_type = Vec<u16>)]
    public_ports: BTreeSet<u16>,
    /// How many, by what became of them; of a running sandbox, when asked for its network
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    packets: Option<BTreeMap<String, u64>>,
}

impl NetworkView {
    /// The view of a sandbox's network.
    pub fn of(data: &SandboxData) -> Self {
        let addresses = data.addresses.as_ref();
        Self {
            attached: addresses.is_some(),
            ipv4: addresses.map(|a| a.ipv4),
            ipv6: addresses.and_then(|a| a.ipv6),
            internet: data.network.internet.clone(),
            network_limits: data.network.limits,
            public_ports: data.network.public_ports.clone(),
            packets: None,
        }
    }

    async fn with_packets(app: &App, sandbox: &Sandbox) -> Result<Self, ApiError> {
        let mut view = Self::of(&sandbox.data());
        if let Some(counted) = app.engine.packets(sandbox).await? {
            let counted = counted.into_iter().map(|(name, count)| (name, count.packets));
            view.packets = Some(counted.collect());
        }
        Ok(view)
    }
}

/// What a sandbox may reach and who may reach it; what is left out stays as it is
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NetworkChange)]
pub struct PolicyBody {
    #[schema(schema_with = internet_schema)]
    pub internet: Option<Internet>,
    /// Most that passes in each direction
    pub network_limits: Option<Limits>,
    /// Ports that anybody may reach through the service, without a token
    #[schema(value_type = Option<Vec<u16>>, max_items = 64)]
    pub public_ports: Option<BTreeSet<u16>>,
}

impl PolicyBody {
    /// The policy that this makes of another one, checked.
    pub fn on(self, app: &App, policy: Policy) -> Result<Policy, ApiError> {
        if app.engine.network().is_none() {
            let why = "this service has no network for sandboxes (its log says why, and so does \
                       `rethaw doctor`): leave it out";
            if self.internet.as_ref().is_some_and(|i| *i != Internet::Off) {
                return Err(ApiError::invalid(format!("internet: {why}")));
            }
            if self.network_limits.is_some_and(|l| l != Limits::default()) {
                return Err(ApiError::invalid(format!("network_limits: {why}")));
            }
        }
        let policy = Policy {
            internet: self.internet.unwrap_or(policy.internet),
            limits: self.network_limits.unwrap_or(policy.limits),
            public_ports: self.public_ports.unwrap_or(policy.public_ports),
        };
        policy.check().map_err(|e| ApiError::invalid(e.to_string()))?;
        Ok(policy)
    }
}

/// Schema of what may be reached.
pub fn internet_schema() -> Schema {
    let word = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["on", "off"]));
    let list = ArrayBuilder::new()
        .items(ObjectBuilder::new().schema_type(Type::String))
        .max_items(Some(MAX_DESTINATIONS));
    let list = ObjectBuilder::new()
        .schema_type(Type::Object)
        .property("allow", list)
        .required("allow")
        .additional_properties(Some(AdditionalProperties::FreeForm(false)));
    let either = OneOfBuilder::new()
        .description(Some(
            "`on`: everything but the host, other sandboxes and cloud metadata; `off`: nothing; \
             `allow`: addresses, networks, host names and `*.names`",
        ))
        .item(ObjectBuilder::new().schema_type(Type::Null))
        .item(word)
        .item(list)
        .build();
    Schema::OneOf(either)
}

/// A sandbox's network, and what of its packets passed
#[utoipa::path(get, path = "/sandboxes/{id}/network", tag = "sandboxes",
    operation_id = "get_sandbox_network",
    params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$")),
    responses((status = 200, description = "Its network", body = NetworkView),
        (status = 404, description = "`sandbox_not_found`"),
        (status = 500, description = "`network_failed`")))]
pub async fn get(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<NetworkView>, ApiError> {
    let sandbox = app.engine.sandbox(&id)?;
    Ok(Json(NetworkView::with_packets(&app, &sandbox).await?))
}

/// Change what a sandbox may reach and who may reach it; in force when answered
#[utoipa::path(patch, path = "/sandboxes/{id}/network", tag = "sandboxes",
    operation_id = "change_sandbox_network",
    params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$")),
    request_body = Option<PolicyBody>,
    responses((status = 200, description = "Its network", body = NetworkView),
        (status = 404, description = "`sandbox_not_found`"),
        (status = 500, description = "`network_failed`, `state_store_failed`")))]
pub async fn change(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<PolicyBody>,
) -> Result<Json<NetworkView>, ApiError> {
    let policy = app.engine.sandbox(&id)?.data().network;
    let policy = body.on(&app, policy)?;
    let sandbox = app.engine.set_network(&id, policy).await?;
    Ok(Json(NetworkView::with_packets(&app, &sandbox).await?))
}
