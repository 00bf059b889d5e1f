//! `cargo xtask prose`: finds phrases that the rules for prose forbid.
//!
//! The check reads comments, documentation, string literals and the names of tests, and compares them with
//! the phrases in `prose.txt`. Identifiers are not read. It reports all findings at once.

mod counts;
mod files;
mod list;
mod markup;
mod rust;
mod text;

use std::collections::BTreeMap;
use std::path::PathBuf;

use self::counts::Counts;
use self::list::{Finding, List};
use self::text::Text;
use crate::run::{CHECKOUT, Result};

/// Options of `cargo xtask prose`.
#[derive(clap::Args)]
pub struct Options {
    /// Count words that readers of this repository stumbled over, per 1,000 words of comments and documents
    #[arg(long)]
    counts: bool,
    /// The folder of the checkout
    #[arg(long, value_name = "DIR", default_value = CHECKOUT, hide_default_value = true)]
    checkout: PathBuf,
    /// Check only files that begin with one of these paths, relative to the checkout [default: all files]
    paths: Vec<String>,
}

/// Checks the whole checkout.
pub fn check() -> Result<()> {
    run(&Options { counts: false, checkout: CHECKOUT.into(), paths: Vec::new() })
}

/// Runs the check, or counts.
pub fn run(options: &Options) -> Result<()> {
    if options.counts {
        println!("{}", Counts::of(texts(options)?.iter().flat_map(|(_, texts)| texts)));
        return Ok(());
    }
    let list = List::read(list::PHRASES)?;
    let mut findings = Vec::new();
    for (path, texts) in texts(options)? {
        findings.extend(texts.iter().flat_map(|text| list.check(&path, text)));
    }
    findings.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    report(&findings)
}

fn texts(options: &Options) -> Result<Vec<(String, Vec<Text>)>> {
    let mut files = files::all(&options.checkout)?;
    let chosen = |path: &String| options.paths.iter().any(|start| path.starts_with(start.as_str()));
    files.retain(|path| options.paths.is_empty() || chosen(path));
    files.into_iter().map(|path| Ok((path.clone(), files::texts(&options.checkout, &path)?))).collect()
}

fn report(findings: &[Finding]) -> Result<()> {
    let mut folders: BTreeMap<&str, usize> = BTreeMap::new();
    for finding in findings {
        let Finding { path, line, phrase, suggestion } = finding;
        println!("{path}:{line}: \"{phrase}\": {suggestion}");
        *folders.entry(folder(path)).or_default() += 1;
    }
    if findings.is_empty() {
        return Ok(());
    }
    println!();
    for (folder, count) in folders {
        println!("{count:6} {folder}");
    }
    Err(format!("{} phrases are against the rules in xtask/prose.txt", findings.len()).into())
}

/// Returns the package's folder of a path, or the first folder.
fn folder(path: &str) -> &str {
    let Some((first, rest)) = path.split_once('/') else { return "." };
    match rest.split_once('/') {
        Some((second, _)) if ["crates", "plugins", "integrations"].contains(&first) => {
            &path[..first.len() + 1 + second.len()]
        }
        _ => first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_is_that_of_the_package() {
        assert_eq!(folder("crates/machinery/src/lib.rs"), "crates/machinery");
        assert_eq!(folder("tests/fixtures/wild/src/lib.rs"), "tests");
        assert_eq!(folder("README.md"), ".");
    }
}
