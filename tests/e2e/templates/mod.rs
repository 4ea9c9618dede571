//! Derived templates: built by steps in a real VM, stacked, warm, deleted only when nothing needs
//! them.

mod configured;
mod crash;
mod failures;
mod store;
mod tree;

use serde_json::{Value, json};

use crate::client::Reply;
use crate::service::Service;

/// A tar archive of these files.
fn archive(files: &[(&str, &str, u32)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, text, mode) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(*mode);
        header.set_cksum();
        archive.append_data(&mut header, path, text.as_bytes()).unwrap();
    }
    archive.into_inner().unwrap()
}

/// Uploads an archive; gives its digest.
async fn upload(service: &Service, bytes: Vec<u8>) -> String {
    use sha2::{Digest, Sha256};
    let sha256 = hex::encode(Sha256::digest(&bytes));
    let path = format!("/v1/inputs/{sha256}");
    let reply = service.client().send("PUT", &path, &[], bytes).await;
    assert!([200, 201].contains(&reply.status), "{}", reply.text());
    service.client().get(&path).await.expect(200);
    sha256
}

async fn ask(service: &Service, name: &str, from: &str, steps: &Value) -> Reply {
    let body = json!({ "name": name, "from": from, "steps": steps });
    service.client().post("/v1/templates", &body).await
}

async fn template(service: &Service, name: &str) -> Value {
    service.client().get(&format!("/v1/templates/{name}")).await.expect(200)
}

/// Waits for the end of a build.
async fn built(service: &Service, name: &str) -> Value {
    service
        .until(&format!("template {name} is made"), async || {
            let template = template(service, name).await;
            ["ready", "failed"].contains(&template["state"].as_str().unwrap()).then_some(template)
        })
        .await
}

/// Builds a template that must come to be.
pub async fn build(service: &Service, name: &str, from: &str, steps: &Value) -> Value {
    let asked = ask(service, name, from, steps).await.expect(202);
    assert_eq!((asked["name"].as_str(), asked["from"].as_str()), (Some(name), Some(from)));
    let template = built(service, name).await;
    assert_eq!(template["state"], "ready", "{template}");
    template
}

pub async fn sandbox(service: &Service, template: &str) -> Value {
    service.create_with(&json!({ "template": template })).await
}

async fn delete(service: &Service, name: &str) -> Reply {
    service.client().delete(&format!("/v1/templates/{name}")).await
}

/// Ids of the snapshots there are.
fn snapshots(service: &Service) -> Vec<String> {
    let dir = service.home().path().join("snapshots");
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    let mut ids: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    ids.sort();
    ids
}

/// The lines of a build's log, until its end.
async fn log(service: &Service, name: &str) -> Vec<Value> {
    let path = format!("/v1/templates/{name}/log?follow=true");
    let text = service.client().get(&path).await.text();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What a step printed.
fn printed(log: &[Value], step: u64) -> String {
    let of_step = log.iter().filter(|l| l["step"] == step && l["kind"] == "stdout");
    of_step.map(|l| l["text"].as_str().unwrap()).collect()
}
