//! From method and path to the function that answers, and the gate in front of them: while the
//! guest has no identity of its own, nothing that could use it is served.

use super::{Answer, ApiError, Body, json, read_json};
use crate::agent::Agent;
use crate::clock::Instant;
use crate::log::Line;
use crate::wire::{LintReport, REQUEST_ID, codes};
use crate::{boot, claim, exec, files, identity, notify, settle, tunnel, usage, users};
use hyper::body::Incoming;
use hyper::http::{Method, Request, Response};
use std::path::Path;
use std::rc::Rc;

/// Answers one request.
pub(super) async fn handle(agent: Rc<Agent>, request: Request<Incoming>) -> Response<Body> {
    let started = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let id = request.headers().get(REQUEST_ID).cloned();
    let response = match route(&agent, request).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    };
    // Asked every few moments, and nobody's request.
    if path != "/health" {
        agent.log.write(&Line {
            request: id.as_ref().and_then(|id| id.to_str().ok()),
            method: method.as_str(),
            path: &path,
            status: response.status().as_u16(),
            micros: started.map_or(0, Instant::micros),
        });
    }
    response
}

async fn route(agent: &Rc<Agent>, request: Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let query = parts.uri.query().unwrap_or("");
    match (&parts.method, path) {
        (&Method::GET, "/health") => json(&agent.health()),
        (&Method::POST, "/claim") => {
            agent.require_live()?;
            let received = Instant::now()?;
            json(&claim::claim(agent, read_json(body).await?, received)?)
        }
        (&Method::POST, "/identity") => {
            let received = Instant::now()?;
            json(&identity::apply(agent, read_json(body).await?, received).await?)
        }
        (&Method::POST, "/clock") => json(&claim::set_clock(agent, &read_json(body).await?)?),
        (&Method::POST, "/resume") => {
            let received = Instant::now()?;
            json(&claim::resume(agent, read_json(body).await?, received).await?)
        }
        (&Method::GET, "/boot") => json(&boot::report().await?),
        (&Method::POST, "/boot/wait") => json(&boot::wait(&read_json(body).await?).await?),
        (&Method::POST, "/settle") => json(&settle::settle(agent, &read_json(body).await?)?),
        (&Method::POST, "/freeze") => json(&settle::freeze(agent, &read_json(body).await?)?),
        (method, _) => {
            agent.require_live()?;
            match (method, path) {
                (&Method::POST, "/exec") => exec::start(agent, body).await,
                (&Method::GET, "/files") => files::get(query, &parts.headers),
                (&Method::PUT, "/files") => files::put(query, &parts.headers, body).await,
                (&Method::DELETE, "/files") => files::delete(query),
                (&Method::POST, "/tunnel") => tunnel::open(query, body).await,
                (&Method::GET, "/dir") => files::folder::read(query),
                (&Method::POST, "/dir") => files::folder::make(&read_json(body).await?),
                (&Method::POST, "/lint") => json(&lint().await?),
                (&Method::GET, "/stat") => files::folder::stat(query),
                (&Method::POST, "/move") => files::folder::rename(&read_json(body).await?),
                (&Method::GET, "/processes") => exec::control::list(agent),
                (method, path) if path.starts_with("/processes/") => {
                    let rest = path.trim_start_matches("/processes/");
                    exec::control::act(agent, method, rest, query, body).await
                }
                (&Method::GET, "/watch") => notify::stream(query),
                (&Method::POST, "/watchers") => notify::add(agent, &read_json(body).await?),
                (method, path) if path.starts_with("/watchers/") => {
                    notify::act(agent, method, path.trim_start_matches("/watchers/"))
                }
                (&Method::GET, "/user") => users::find(agent, query),
                (&Method::GET, "/usage") => json(&usage::usage(agent)?),
                (
                    _,
                    "/exec" | "/files" | "/tunnel" | "/dir" | "/stat" | "/move" | "/processes"
                    | "/lint" | "/watch" | "/watchers" | "/user" | "/usage",
                ) => Err(method_not_allowed(method, path)),
                _ => Err(ApiError::new(404, codes::NOT_FOUND, format!("no endpoint {path}"))),
            }
        }
    }
}

/// Looks through the whole system, on a thread of its own: other requests are served meanwhile.
async fn lint() -> Result<LintReport, ApiError> {
    let work = || crate::lint::lint(Path::new("/"), Path::new("/proc"));
    let report = tokio::task::spawn_blocking(work).await;
    Ok(report.map_err(|e| ApiError::internal(format!("lint: {e}")))??)
}

fn method_not_allowed(method: &Method, path: &str) -> ApiError {
    ApiError::new(405, codes::METHOD_NOT_ALLOWED, format!("{path} does not take {method}"))
}
