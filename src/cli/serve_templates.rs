//! `[[templates]]` of the configuration file: what templates the service is to have, as it is
//! written, and as the engine takes it.
//!
//! ```toml
//! [[templates]]
//! name = "app"
//! env = { MODE = "production" }
//! [[templates.steps]]
//! copy = { src = "app", dst = "/srv/app" }    # src is relative to the file
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::template::steps::{self, PackStepError};
use crate::engine::build::{Spec, check_name};
use crate::engine::configured::Configured;
use crate::engine::template::BASE;

/// One template.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateTable {
    name: String,
    /// Template it starts from; `base` when it does not say.
    from: Option<String>,
    /// Parked VMs of it.
    pool_target: Option<u32>,
    /// Variables for all its steps and for sandboxes.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// What is done in it, as the API takes it, but for `copy`.
    #[serde(default)]
    steps: Vec<Map<String, Value>>,
}

/// Why the templates cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TemplatesError {
    /// A field is not acceptable.
    #[error("templates[{number}].{problem}")]
    Invalid {
        /// Which template, from 0.
        number: usize,
        /// Which field, and why.
        problem: String,
    },
    /// What a step copies cannot be packed.
    #[error("templates[{number}].steps[{step}].copy: {source}")]
    Copy {
        /// Which template, from 0.
        number: usize,
        /// Which step, from 0.
        step: usize,
        /// Why.
        source: PackStepError,
    },
}

/// The templates with all that they copy, each behind the one it starts from; their pools' targets
/// are put into `pools`.
pub fn resolve(
    tables: Vec<TemplateTable>,
    dir: &Path,
    pools: &mut BTreeMap<String, u32>,
) -> Result<Vec<Configured>, TemplatesError> {
    let mut found: Vec<(usize, Configured)> = Vec::new();
    for (number, table) in tables.into_iter().enumerate() {
        let invalid = |problem: String| TemplatesError::Invalid { number, problem };
        check_name(&table.name).map_err(invalid)?;
        if table.name == BASE {
            return Err(invalid(format!("name: {BASE:?} is the service's own")));
        }
        if found.iter().any(|(_, other)| other.name == table.name) {
            return Err(invalid(format!("name: there is another {:?}", table.name)));
        }
        if let Some(target) = table.pool_target
            && pools.insert(table.name.clone(), target).is_some()
        {
            let problem = format!("pool_target: [pools] has one for {:?}, too", table.name);
            return Err(invalid(problem));
        }
        found.push((number, table.resolve(number, dir)?));
    }
    in_order(found)
}

impl TemplateTable {
    fn resolve(self, number: usize, dir: &Path) -> Result<Configured, TemplatesError> {
        let invalid = |problem: String| TemplatesError::Invalid { number, problem };
        let (mut steps, mut archives) = (Vec::new(), Vec::new());
        for (step, mut table) in self.steps.into_iter().enumerate() {
            let packed = steps::pack(&mut table, dir);
            let packed = packed.map_err(|source| TemplatesError::Copy { number, step, source })?;
            archives.extend(packed.map(|archive| archive.bytes));
            steps.push(Value::Object(table));
        }
        let from = self.from.unwrap_or_else(|| BASE.to_owned());
        let mut spec = Spec::parse(from, steps).map_err(invalid)?;
        if !self.env.is_empty() {
            let env = vec![json!({ "env": self.env })];
            let env = Spec::parse(String::new(), env);
            let env = env.map_err(|e| invalid(e.trim_start_matches("steps[0].").to_owned()))?;
            spec.steps.splice(0..0, env.steps);
        }
        Ok(Configured { name: self.name, spec, archives })
    }
}

/// Puts each behind the one it starts from.
fn in_order(mut left: Vec<(usize, Configured)>) -> Result<Vec<Configured>, TemplatesError> {
    let mut ordered = Vec::new();
    while !left.is_empty() {
        let waiting: BTreeSet<String> = left.iter().map(|(_, t)| t.name.clone()).collect();
        let (later, now): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|(_, t)| waiting.contains(&t.spec.from));
        if let (true, Some((number, template))) = (now.is_empty(), later.first()) {
            let problem = format!("from: {:?} starts from itself in the end", template.name);
            return Err(TemplatesError::Invalid { number: *number, problem });
        }
        ordered.extend(now.into_iter().map(|(_, template)| template));
        left = later;
    }
    Ok(ordered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        templates: Vec<TemplateTable>,
    }

    fn read(text: &str, dir: &Path) -> Result<(Vec<Configured>, BTreeMap<String, u32>), String> {
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        let mut pools = BTreeMap::from([("given".to_owned(), 1)]);
        let found = resolve(file.templates, dir, &mut pools).map_err(|e| e.to_string())?;
        Ok((found, pools))
    }

    #[test]
    fn each_comes_behind_the_one_it_starts_from() {
        let text = "[[templates]]\nname = \"c\"\nfrom = \"b\"\n[[templates]]\nname = \"b\"\n\
                    from = \"a\"\npool_target = 3\n[[templates]]\nname = \"a\"\n\
                    [[templates]]\nname = \"d\"\nfrom = \"elsewhere\"\n";
        let (found, pools) = read(text, Path::new("/")).unwrap();
        let names: Vec<_> = found.iter().map(|t| (&*t.name, &*t.spec.from)).collect();
        assert_eq!(names, [("a", "base"), ("d", "elsewhere"), ("b", "a"), ("c", "b")]);
        assert_eq!(pools.get("b"), Some(&3));
    }

    #[test]
    fn variables_come_first_and_copies_are_beside_the_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("app"), "x").unwrap();
        let text = "[[templates]]\nname = \"a\"\nenv = { A = \"1\" }\n[[templates.steps]]\n\
                    copy = { src = \"app\", dst = \"/srv/app\" }\n";
        let (found, _) = read(text, dir.path()).unwrap();
        let steps = serde_json::to_value(&found[0].spec.steps).unwrap();
        assert_eq!(steps[0], json!({ "env": { "A": "1" } }));
        assert_eq!(steps[1]["copy"]["dst"], "/srv");
        assert_eq!(found[0].archives.len(), 1);
        // The same in steps of its own is the same template.
        let spelled = "[[templates]]\nname = \"b\"\n[[templates.steps]]\nenv = { A = \"1\" }\n\
                       [[templates.steps]]\ncopy = { src = \"app\", dst = \"/srv/app\" }\n";
        assert_eq!(read(spelled, dir.path()).unwrap().0[0].spec, found[0].spec);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let first = "[[templates]]\nname = \"a\"\n[[templates]]\n";
        let step = |step: &str| format!("name = \"b\"\n[[templates.steps]]\n{step}\n");
        for (second, wanted) in [
            ("name = \"B\"\n".to_owned(), "templates[1].name: \"B\" is not"),
            ("name = \"a\"\n".to_owned(), "templates[1].name: there is another \"a\""),
            ("name = \"base\"\n".to_owned(), "templates[1].name: \"base\" is"),
            ("nmae = \"b\"\n".to_owned(), "unknown field `nmae`"),
            ("name = \"b\"\nfrom = \"b\"\n".to_owned(), "templates[1].from: \"b\" starts from"),
            ("name = \"given\"\npool_target = 2\n".to_owned(), "templates[1].pool_target: [pools]"),
            ("name = \"b\"\nenv = { \"A=\" = \"1\" }\n".to_owned(), "templates[1].env: \"A=\""),
            (step("run = \" \""), "templates[1].steps[0].run: a command is needed"),
            (step("run = 5"), "templates[1].steps[0].run: a command, or"),
            (step("walk = \"x\""), "templates[1].steps[0]: unknown variant `walk`"),
            (step("wait = { port = 70000 }"), "templates[1].steps[0].wait.port: "),
            (step("copy = { src = \"x\" }"), "templates[1].steps[0].copy: copy needs src and dst"),
            (
                step("copy = { src = \"none\", dst = \"/x\" }"),
                "steps[0].copy: cannot read /nowhere",
            ),
        ] {
            let error = read(&format!("{first}{second}"), Path::new("/nowhere")).unwrap_err();
            assert!(error.contains(wanted), "{second}: {error}");
        }
    }
}
