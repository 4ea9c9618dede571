//! `--env NAME=VALUE` and `--label NAME=VALUE`.

use std::collections::BTreeMap;

/// A variable as typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    name: String,
    // `None`: take it from this process.
    value: Option<String>,
}

/// A variable that was named without a value and that this process does not have.
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    /// Not set, or not text.
    #[error("--env {0}: this process has no such variable; give a value as in {0}=VALUE")]
    NotSet(String),
}

/// Parses `NAME=VALUE` or `NAME`.
pub fn parse(text: &str) -> Result<Variable, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    if name.is_empty() {
        return Err("the name is missing; write NAME=VALUE".to_owned());
    }
    Ok(Variable { name: name.to_owned(), value })
}

/// Parses `NAME=VALUE`.
pub fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it as NAME=VALUE".to_owned()),
    }
}

/// All variables with their values; the last one of a name counts.
pub fn collect(variables: &[Variable]) -> Result<BTreeMap<String, String>, EnvError> {
    collect_with(variables, |name| std::env::var(name).ok())
}

fn collect_with(
    variables: &[Variable],
    own: impl Fn(&str) -> Option<String>,
) -> Result<BTreeMap<String, String>, EnvError> {
    let mut map = BTreeMap::new();
    for Variable { name, value } in variables {
        let value = value.clone().or_else(|| own(name));
        map.insert(name.clone(), value.ok_or_else(|| EnvError::NotSet(name.clone()))?);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_may_hold_anything() {
        let parsed: Vec<_> =
            ["A=1", "B=x=y", "C=", "HOME"].iter().map(|text| parse(text).unwrap()).collect();
        let own = |name: &str| (name == "HOME").then(|| "/me".to_owned());
        let map = collect_with(&parsed, own).unwrap();
        let pairs: Vec<_> = map.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(pairs, [("A", "1"), ("B", "x=y"), ("C", ""), ("HOME", "/me")]);
    }

    #[test]
    fn mistakes_are_named() {
        assert!(parse("=1").is_err());
        assert!(parse_pair("A").is_err());
        let missing = collect_with(&[parse("NOPE").unwrap()], |_| None).unwrap_err().to_string();
        assert!(missing.contains("NOPE=VALUE"), "{missing}");
    }
}
