//! `[[templates]]` of the configuration file: built at start, found again at the next, and made anew
//! when they are described differently.

use std::path::Path;

use serde_json::{Value, json};

use super::{built, delete, log, sandbox, snapshots, template};
use crate::client::{DEADLINE, within};
use crate::home::Home;
use crate::service::{Service, id, rethaw};

/// `top` is written before what it starts from.
const CONFIG: &str = r#"
[[templates]]
name = "top"
from = "app"
[[templates.steps]]
run = "cp /srv/app/data.txt /srv/top.txt"

[[templates]]
name = "broken"
[[templates.steps]]
run = "echo no luck >&2; exit 3"

[[templates]]
name = "app"
pool_target = 1
env = { MODE = "production" }
[[templates.steps]]
copy = { src = "app", dst = "/srv/app" }
[[templates.steps]]
run = "test $MODE = production"
"#;

fn write(dir: &Path, config: &str, data: &str) {
    std::fs::create_dir_all(dir.join("app")).unwrap();
    std::fs::write(dir.join("app/data.txt"), data).unwrap();
    std::fs::write(dir.join("rethaw.toml"), config).unwrap();
}

async fn ready(service: &Service, name: &str) -> Value {
    let template = built(service, name).await;
    assert_eq!(template["state"], "ready", "{template}");
    template
}

/// Waits for a template of another snapshot than this.
async fn moved(service: &Service, name: &str, before: &Value) -> Value {
    service
        .until(&format!("template {name} is made anew"), async || {
            let now = template(service, name).await;
            assert_ne!(now["state"], "failed", "{now}");
            let new = now["snapshot"]["id"].is_string() && now["snapshot"]["id"] != before["id"];
            new.then_some(now)
        })
        .await
}

#[tokio::test]
async fn templates_of_the_file_are_there() {
    let home = Home::new().await;
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), CONFIG, "one");
    let config = dir.path().join("rethaw.toml");
    let flags = ["--config", config.to_str().unwrap()];
    let mut service = Service::start_on(home, 0, &flags, DEADLINE).await;
    // Listed from the start, and none of them is waited for.
    let list = service.client().get("/v1/templates").await.expect(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 4, "{list}");
    let app = ready(&service, "app").await;
    let top = ready(&service, "top").await;
    assert_eq!(top["lineage"], json!(["base", "app", "top"]));
    let broken = built(&service, "broken").await;
    assert_eq!(
        (&broken["state"], &broken["failure"]["exit_code"]),
        (&json!("failed"), &json!(3)),
        "{broken}"
    );
    let said = log(&service, "broken").await;
    assert!(said.iter().any(|line| line["text"] == "no luck\n"), "{said:?}");
    let pool = service.client().get("/v1/pools/app").await.expect(200);
    assert_eq!(pool["target"], 1);
    let old = id(&sandbox(&service, "app").await);
    assert_eq!(service.sh(&old, "cat /srv/app/data.txt; echo $MODE").await, "oneproduction");
    service.act(&old, "pause", &json!({})).await.expect(200);
    let running = id(&sandbox(&service, "top").await);
    assert_eq!(service.sh(&running, "cat /srv/top.txt").await, "one");
    service.client().delete(&format!("/v1/sandboxes/{running}")).await.expect(204);

    // The same file again: nothing is done but for what failed.
    service.terminate().await;
    service.start_again().await;
    for before in [&app, &top] {
        let now = template(&service, before["name"].as_str().unwrap()).await;
        assert_eq!((&now["state"], &now["created_at"]), (&json!("ready"), &before["created_at"]));
        assert_eq!(now["snapshot"]["id"], before["snapshot"]["id"]);
    }
    assert_eq!(built(&service, "broken").await["state"], "failed");

    // Another file to copy, and a step that works: the names move to what is described now, also
    // that of the template whose own steps are the same.
    service.terminate().await;
    write(dir.path(), &CONFIG.replace("exit 3", "exit 0"), "two");
    service.start_again().await;
    let new_app = moved(&service, "app", &app["snapshot"]).await;
    let new_top = moved(&service, "top", &top["snapshot"]).await;
    ready(&service, "broken").await;
    let new = id(&sandbox(&service, "top").await);
    assert_eq!(service.sh(&new, "cat /srv/app/data.txt /srv/top.txt").await, "twotwo");
    // What stands on the old one lives on, and keeps it.
    service.act(&old, "resume", &json!({})).await.expect(200);
    assert_eq!(service.sh(&old, "cat /srv/app/data.txt").await, "one");
    let there = snapshots(&service);
    let is_there = |snapshot: &Value| there.contains(&snapshot["id"].as_str().unwrap().to_owned());
    assert!(is_there(&app["snapshot"]) && is_there(&new_app["snapshot"]), "{there:?}");
    assert!(is_there(&new_top["snapshot"]) && !is_there(&top["snapshot"]), "{there:?}");

    // Deleted, it comes back with the next start.
    for sandbox in [&old, &new] {
        service.client().delete(&format!("/v1/sandboxes/{sandbox}")).await.expect(204);
    }
    let bytes = async || {
        let text = service.client().get("/metrics").await.text();
        let name = "rethaw_template_disk_bytes{template=\"top\"} ";
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse::<f64>().unwrap()
    };
    assert!(bytes().await > 0.0);
    delete(&service, "top").await.expect(204);
    assert_eq!(bytes().await, 0.0, "of a template that is gone");
    service.terminate().await;
    service.start_again().await;
    let again = ready(&service, "top").await;
    assert_eq!(again["snapshot"]["id"], new_top["snapshot"]["id"]);
    service.stop().await;
}

#[tokio::test]
async fn a_slip_in_the_file_is_named_at_start() {
    let dir = tempfile::tempdir().unwrap();
    for (config, wanted) in [
        (
            CONFIG.replace("run = \"echo no", "run = \" \" # \"echo no"),
            "templates[1].steps[0].run:",
        ),
        (
            CONFIG.replace("src = \"app\"", "src = \"none\""),
            "templates[2].steps[0].copy: cannot read",
        ),
        (CONFIG.replace("name = \"app\"", "name = \"app\"\nfrom = \"top\""), "templates[0].from:"),
    ] {
        write(dir.path(), &config, "one");
        let mut command = rethaw();
        command.arg("serve").arg("--config").arg(dir.path().join("rethaw.toml"));
        command.arg("--home").arg(dir.path().join("home"));
        let run = tokio::task::spawn_blocking(move || command.output().unwrap());
        let done = within("the service's refusal", run).await.unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && said.contains(wanted), "{wanted}: {said}");
    }
}
