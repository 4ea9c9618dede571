//! One command on several things: each gets its turn, and one that fails stops none of the others.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::client::ClientError;
use super::output;

/// What became of each.
#[derive(Debug)]
pub struct Report {
    json: bool,
    items: Vec<Value>,
    failed: usize,
}

impl Report {
    /// An empty one.
    pub fn new(json: bool) -> Self {
        Self { json, items: Vec::new(), failed: 0 }
    }

    /// Takes down how it went for `id`: a line for people at once, or an item for the document.
    pub fn add(
        &mut self,
        id: &str,
        result: Result<Value, ClientError>,
        line: &str,
    ) -> anyhow::Result<()> {
        match result {
            Ok(mut value) => {
                if !self.json {
                    return output::line(line);
                }
                if let Some(object) = value.as_object_mut() {
                    object.entry("id").or_insert_with(|| id.into());
                }
                self.items.push(value);
            }
            Err(e) => {
                self.failed += 1;
                output::note(&format!("{id}: {e}"));
                let code = e.error_code().unwrap_or("request_failed");
                let error = json!({ "error_code": code, "message": e.to_string() });
                self.items.push(json!({ "id": id, "error": error }));
            }
        }
        Ok(())
    }

    /// Prints the document, if one is wanted, and says how this process ends.
    pub fn finish(
        self,
        print: impl FnOnce(&Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<ExitCode> {
        if self.json {
            print(&json!({ "items": self.items }))?;
        }
        Ok(if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_told_and_stops_nothing() {
        let mut report = Report::new(true);
        report.add("a", Ok(json!({})), "").unwrap();
        let gone = ClientError::NotRunning { url: "http://x".into() };
        report.add("b", Err(gone), "").unwrap();
        report.add("c", Ok(json!({"id": "c2", "state": "paused"})), "").unwrap();
        let mut printed = Value::Null;
        let code = report
            .finish(|value| {
                printed = value.clone();
                Ok(())
            })
            .unwrap();
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::FAILURE));
        assert_eq!(printed["items"][0], json!({"id": "a"}));
        assert_eq!(printed["items"][1]["error"]["error_code"], "request_failed");
        assert_eq!(printed["items"][2]["id"], "c2");
    }
}
