//! Metrics of a live service against what is written about them: the table in
//! `docs/operations.md` and the dashboard in `packaging/grafana.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::service::Service;

fn file(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// What `/metrics` exports: kinds and explanations by name, and all label names.
#[derive(Debug, Default)]
struct Exported {
    kinds: BTreeMap<String, String>,
    helps: BTreeMap<String, String>,
    labels: BTreeMap<String, BTreeSet<String>>,
    samples: BTreeSet<String>,
}

impl Exported {
    fn parse(text: &str) -> Self {
        let mut exported = Self::default();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(
                    exported.kinds.insert(name.to_owned(), kind.to_owned()).is_none(),
                    "{name}"
                );
            } else if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                exported.helps.insert(name.to_owned(), help.to_owned());
            } else if !line.is_empty() {
                let (series, value) = line.rsplit_once(' ').unwrap();
                assert!(value.parse::<f64>().is_ok(), "{line}");
                let (name, labels) = series.split_once('{').unwrap_or((series, ""));
                exported.samples.insert(name.to_owned());
                let names =
                    labels.trim_end_matches('}').split("\",").filter_map(|l| l.split_once('='));
                let names = names.map(|(name, _)| name.to_owned()).filter(|name| name != "le");
                let metric = exported.metric_of(name).to_owned();
                exported.labels.entry(metric).or_default().extend(names);
            }
        }
        exported
    }

    /// The metric that a sample belongs to: those of a histogram have endings.
    fn metric_of<'a>(&self, sample: &'a str) -> &'a str {
        for ending in ["_bucket", "_sum", "_count"] {
            if let Some(base) = sample.strip_suffix(ending)
                && self.kinds.get(base).is_some_and(|kind| kind == "histogram")
            {
                return base;
            }
        }
        sample
    }
}

/// Names of metrics in a text.
fn names_in(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("rethaw_") || word.starts_with("process_"))
        .map(str::to_owned)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_what_is_written_about_them() {
    let service = Service::start(1).await;
    // Before anything happened, too: a counter that is not there cannot be watched.
    let id = service.create().await;
    service.sh(&id, "true").await;
    let text = service.client().get("/metrics").await.text();
    let exported = Exported::parse(&text);

    let table: Vec<Vec<String>> = file("docs/operations.md")
        .lines()
        .filter(|line| line.starts_with("| `rethaw_") || line.starts_with("| `process_"))
        .map(|line| {
            line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()
        })
        .collect();
    assert!(table.len() > 20);
    let mut documented = BTreeSet::new();
    for row in &table {
        let [name, kind, _, labels, meaning] = row.as_slice() else { panic!("{row:?}") };
        let name = name.trim_matches('`');
        documented.insert(name.to_owned());
        // Some are there only once there is something to say, and say so.
        if meaning.contains("absent") && !exported.kinds.contains_key(name) {
            continue;
        }
        assert_eq!(exported.kinds.get(name), Some(kind), "{name}");
        if name.starts_with("rethaw_") {
            let help = exported.helps.get(name).map(|help| help.replace("\\\\", "\\"));
            assert_eq!(help.as_deref(), Some(meaning.as_str()), "{name}");
            let labels = labels.split_whitespace().map(|label| label.trim_matches('`').to_owned());
            let used = exported.labels.get(name).cloned().unwrap_or_default();
            assert_eq!(used, labels.collect(), "{name}");
        }
    }
    let unknown: Vec<_> =
        exported.kinds.keys().filter(|name| !documented.contains(*name)).collect();
    assert!(unknown.is_empty(), "not in docs/operations.md: {unknown:?}");

    let dashboard: Value = serde_json::from_str(&file("packaging/grafana.json")).unwrap();
    let mut expressions = Vec::new();
    collect(&dashboard, &mut expressions);
    assert!(expressions.len() > 20);
    for expression in expressions {
        let names = names_in(&expression);
        assert!(!names.is_empty(), "{expression}");
        for name in names {
            assert!(exported.samples.contains(&name), "{name} is not exported: {expression}");
        }
    }
    service.stop().await;
}

/// Every query in the dashboard, of panels and of variables.
fn collect(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                match value {
                    Value::String(text) if name == "expr" => found.push(text.clone()),
                    Value::String(text) if name == "definition" => found.push(text.clone()),
                    other => collect(other, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, found)),
        _ => {}
    }
}
