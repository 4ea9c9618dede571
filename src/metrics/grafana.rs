//! The dashboard in `packaging/grafana.json`: that every metric in it is one of ours, and that it has
//! what Grafana requires of a file that is imported.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::catalogue::{ALL, Kind};

fn dashboard() -> Value {
    serde_json::from_str(include_str!("../../packaging/grafana.json")).unwrap()
}

/// Every query, of panels and of variables.
fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                match value {
                    Value::String(text) if ["expr", "definition"].contains(&&**name) => {
                        found.push(text.clone());
                    }
                    other => queries(other, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| queries(item, found)),
        _ => {}
    }
}

/// What a query can name: a histogram is exported as three.
fn samples() -> BTreeSet<String> {
    let suffixes = |kind| match kind {
        Kind::Histogram => &["_bucket", "_sum", "_count"][..],
        Kind::Counter | Kind::Gauge => &[""],
    };
    ALL.iter()
        .flat_map(|m| suffixes(m.kind).iter().map(|suffix| format!("{}{suffix}", m.name)))
        .collect()
}

#[test]
fn every_query_is_about_metrics_there_are() {
    let (mut found, known) = (Vec::new(), samples());
    queries(&dashboard(), &mut found);
    assert!(found.len() > 20, "{found:?}");
    for query in found {
        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let ours: Vec<_> = words.filter(|word| word.split('_').next() == Some("rethaw")).collect();
        let of_process = query.contains("process_") || query.contains("up{");
        assert!(!ours.is_empty() || of_process, "about nothing: {query}");
        for name in ours {
            assert!(known.contains(name), "{name} is not in the catalogue: {query}");
        }
    }
}

/// Ids of their own, places that do not overlap, the data source a variable.
#[test]
fn grafana_can_import_it() {
    let dashboard = dashboard();
    assert!(dashboard["schemaVersion"].as_u64().unwrap() >= 36);
    assert_eq!(dashboard["id"], Value::Null, "one is given at the import");
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let is_source = |v: &&Value| v["type"] == "datasource" && v["query"] == "prometheus";
    assert_eq!(variables.iter().find(is_source).unwrap()["name"], "datasource");
    let (mut ids, mut taken) = (BTreeSet::new(), BTreeSet::new());
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}");
        let at = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24, "{title}");
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(taken.insert((x, y)), "{title} lies on another panel");
            }
        }
        if panel["type"] == "row" {
            continue;
        }
        let source = json!({ "type": "prometheus", "uid": "${datasource}" });
        assert_eq!(panel["datasource"], source, "{title}");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title}");
        for target in panel["targets"].as_array().unwrap() {
            assert!(target["refId"].is_string() && target["expr"].is_string(), "{title}");
        }
    }
}
