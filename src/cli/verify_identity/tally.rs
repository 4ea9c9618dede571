//! Counts over all clones, and what is wrong with them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::look::Look;

/// Where the service's account has the value that was also seen in the guest.
const TOLD: &[&str] = &["hostname", "machine_id", "boot_id", "mac", "generation"];

/// All values of one kind.
#[derive(Debug, Default)]
pub struct Row {
    values: BTreeMap<String, u32>,
}

impl Row {
    /// How many different values there are.
    pub fn distinct(&self) -> usize {
        self.values.len()
    }

    /// How many values there are.
    pub fn count(&self) -> u32 {
        self.values.values().sum()
    }

    /// How many clones share the value that is shared most.
    pub fn most_alike(&self) -> u32 {
        self.values.values().copied().max().unwrap_or(0)
    }
}

/// What the agent reported of one item.
#[derive(Debug, Default)]
pub struct Proof {
    /// Clones in which it was read back.
    pub verified: u32,
    /// Clones whose report names it.
    pub of: u32,
    /// Longest time in the guest.
    pub worst_micros: u64,
    /// Why there was nothing to do, when there was nothing.
    pub skipped: Option<String>,
}

/// The clones so far.
#[derive(Debug, Default)]
pub struct Tally {
    clones: u32,
    samples: BTreeMap<String, Row>,
    proofs: BTreeMap<String, Proof>,
    clock_error_ms: f64,
    faults: Vec<String>,
}

impl Tally {
    /// Takes in a clone: the service's object, and what was seen inside.
    pub fn add(&mut self, sandbox: &Value, look: Look) {
        self.clones += 1;
        self.clock_error_ms = self.clock_error_ms.max(look.clock_error_ms);
        let id = sandbox["id"].as_str().unwrap_or_default();
        let identity = &sandbox["identity"];
        for name in TOLD {
            let (told, seen) = (identity[name].as_str(), look.values.get(*name));
            // A template without a NIC shows no hardware address.
            if seen.is_none() && *name == "mac" {
                continue;
            }
            if told != seen.map(String::as_str) {
                let text = format!("sandbox {id}: {name} is {seen:?}, the service says {told:?}");
                self.faults.push(text);
            }
        }
        for (name, value) in look.values {
            *self.samples.entry(name).or_default().values.entry(value).or_default() += 1;
        }
        let token = sandbox["access_token"].as_str().unwrap_or_default().to_owned();
        let row = self.samples.entry("access_token".to_owned()).or_default();
        *row.values.entry(token).or_default() += 1;
        let items = identity["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        if items.is_empty() {
            self.faults.push(format!("sandbox {id}: the service reports no identity items"));
        }
        for item in items {
            let name = item["item"].as_str().unwrap_or_default();
            let row = self.proofs.entry(name.to_owned()).or_default();
            row.of += 1;
            row.worst_micros = row.worst_micros.max(item["micros"].as_u64().unwrap_or(0));
            if item["verified"] == true {
                row.verified += 1;
            } else if let Some(reason) = item["skipped"].as_str() {
                row.skipped = Some(reason.to_owned());
            } else {
                self.faults.push(format!("sandbox {id}: {name} is not verified"));
            }
        }
    }

    /// Clones taken in.
    pub fn clones(&self) -> u32 {
        self.clones
    }

    /// Largest error of a clock.
    pub fn clock_error_ms(&self) -> f64 {
        self.clock_error_ms
    }

    /// Kinds of values.
    pub fn samples(&self) -> impl Iterator<Item = (String, &Row)> {
        self.samples.iter().map(|(name, row)| (name.clone(), row))
    }

    /// Items of the agent's reports.
    pub fn proofs(&self) -> impl Iterator<Item = (String, &Proof)> {
        self.proofs.iter().map(|(name, row)| (name.clone(), row))
    }

    /// All that is wrong; nothing, when the clones are as many machines.
    pub fn faults(&self, max_clock_error_ms: f64) -> Vec<String> {
        let mut faults = self.faults.clone();
        for (name, row) in &self.samples {
            if row.most_alike() > 1 {
                let (distinct, clones) = (row.distinct(), self.clones);
                faults.push(format!("{name}: {distinct} different values in {clones} clones"));
            }
            if row.count() != self.clones {
                let (count, clones) = (row.count(), self.clones);
                faults.push(format!("{name}: seen in {count} of {clones} clones only"));
            }
        }
        if self.clock_error_ms > max_clock_error_ms {
            let error = self.clock_error_ms;
            faults.push(format!("clock: {error:.1} ms off, allowed are {max_clock_error_ms} ms"));
        }
        faults
    }

    /// The same as a document.
    pub fn json(&self) -> Value {
        let samples: Vec<Value> = (self.samples.iter())
            .map(|(item, row)| {
                json!({ "item": item, "distinct": row.distinct(), "of": row.count(),
                    "most_alike": row.most_alike() })
            })
            .collect();
        let items: Vec<Value> = (self.proofs.iter())
            .map(|(item, row)| {
                json!({ "item": item, "verified": row.verified, "of": row.of,
                    "worst_micros": row.worst_micros, "skipped": row.skipped })
            })
            .collect();
        json!({ "clones": self.clones, "samples": samples, "items": items,
            "clock_worst_error_ms": self.clock_error_ms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clone(n: u32, hostname: &str, verified: bool) -> (Value, Look) {
        let sandbox = json!({ "id": format!("id{n}"), "access_token": format!("t{n}"), "identity": {
            "hostname": hostname, "machine_id": format!("m{n}"), "boot_id": format!("b{n}"),
            "mac": format!("a{n}"), "generation": format!("g{n}"),
            "items": [{ "item": "hostname", "verified": verified, "micros": n },
                { "item": "hooks", "verified": false, "skipped": "none", "micros": 0 }] } });
        let pairs = [("machine_id", "m"), ("boot_id", "b"), ("generation", "g"), ("mac", "a")];
        let mut values: BTreeMap<String, String> =
            pairs.iter().map(|(name, p)| ((*name).to_owned(), format!("{p}{n}"))).collect();
        values.insert("hostname".to_owned(), hostname.to_owned());
        (sandbox, Look { values, clock_error_ms: f64::from(n) })
    }

    fn tally(clones: &[(Value, Look)]) -> Tally {
        let mut tally = Tally::default();
        for (sandbox, Look { values, clock_error_ms }) in clones {
            let (values, clock_error_ms) = (values.clone(), *clock_error_ms);
            tally.add(sandbox, Look { values, clock_error_ms });
        }
        tally
    }

    #[test]
    fn different_machines_are_faultless() {
        let tally = tally(&[clone(1, "x", true), clone(2, "y", true)]);
        assert_eq!(tally.faults(10.0), Vec::<String>::new());
        assert_eq!(tally.json()["samples"][0]["distinct"], 2);
        assert_eq!(tally.json()["items"][1]["verified"], 2);
    }

    #[test]
    fn each_kind_of_fault_is_found() {
        let faults = |clones: &[(Value, Look)]| tally(clones).faults(10.0).join("\n");
        assert!(
            faults(&[clone(1, "x", true), clone(2, "x", true)]).contains("hostname: 1 different")
        );
        assert!(faults(&[clone(1, "x", false)]).contains("hostname is not verified"));
        assert!(faults(&[clone(11, "x", true)]).contains("clock: 11.0 ms off"));
        let mut other = clone(1, "x", true);
        other.0["identity"]["hostname"] = "z".into();
        assert!(faults(&[other]).contains("the service says Some(\"z\")"));
        let mut less = clone(2, "y", true);
        less.1.values.remove("boot_id");
        assert!(faults(&[clone(1, "x", true), less]).contains("boot_id: seen in 1 of 2"));
    }
}
