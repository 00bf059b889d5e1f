//! Writes the manual pages and the completions for shells, as a tree below a folder `share`.
//!
//! Pages of commands and completions come from the definitions of the command line. The page of `machinery-host.yaml` comes
//! from the commented default of that file, so that each has one source.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate};
use clap_mangen::Man;
use machinery::{Error, Result};
use roff::{Roff, bold, roman};

use super::args::Cli;

const PROGRAM: &str = "cuckoo-machinery";
/// The source of each page.
const SOURCE: &str = concat!("cuckoo-machinery ", env!("CARGO_PKG_VERSION"));
/// No date, so that each build writes the same pages.
const NO_DATE: &str = " ";
/// The commented defaults.
const HOST_YAML: &str = include_str!("../../../../conf/machinery-host.yaml");

/// The completion of each shell, and its path below `share`.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions/cuckoo-machinery"),
    (Shell::Zsh, "zsh/site-functions/_cuckoo-machinery"),
    (Shell::Fish, "fish/vendor_completions.d/cuckoo-machinery.fish"),
];

/// Writes all pages and completions below the folder.
///
/// # Errors
/// A file cannot be written.
pub fn write(share: &Path) -> Result<()> {
    let failed = |path: &Path, error: &io::Error| Error::io("write the manual", path, error);
    let [man1, man5] = ["man/man1", "man/man5"].map(|folder| share.join(folder));
    for folder in [&man1, &man5] {
        fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
    }
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    write_commands(&command, &man1).map_err(|error| failed(&man1, &error))?;
    let page = man5.join("machinery-host.yaml.5");
    fs::write(&page, host_yaml()).map_err(|error| failed(&page, &error))?;
    for (shell, path) in COMPLETIONS {
        let path = share.join(path);
        let folder = path.parent().unwrap_or(share);
        fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
        let mut file = File::create(&path).map_err(|error| failed(&path, &error))?;
        generate(shell, &mut Cli::command(), PROGRAM, &mut file);
    }
    Ok(())
}

/// Writes the page of a command, and those of its own commands.
fn write_commands(command: &Command, folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(PROGRAM);
    let page = Man::new(command.clone()).title(name).date(NO_DATE).source(SOURCE).manual("Commands");
    page.render(&mut File::create(folder.join(format!("{name}.1")))?)?;
    let mut commands = command.get_subcommands().filter(|command| !command.is_hide_set());
    commands.try_for_each(|command| write_commands(command, folder))
}

/// Returns the page `machinery-host.yaml(5)`.
fn host_yaml() -> String {
    let mut page = Roff::new();
    page.control("TH", ["machinery-host.yaml", "5", NO_DATE, SOURCE, "File formats"]);
    page.control("SH", ["NAME"]);
    page.text([roman(
        "machinery-host.yaml - configuration of the machinery host beyond Cuckoo3's own files",
    )]);
    page.control("SH", ["SYNOPSIS"]);
    page.text([bold("conf/machinery-host.yaml"), roman(" in Cuckoo's working directory")]);
    page.control("SH", ["DESCRIPTION"]);
    let mut blocks = HOST_YAML.split("\n\n").map(Block::parse);
    if let Some(Block { text, .. }) = blocks.next() {
        page.text([roman(text)]);
    }
    page.control("SH", ["KEYS"]);
    for Block { keys, text, yaml } in blocks {
        page.control("SS", [keys.join(", ").as_str()]);
        page.text([roman(text)]);
        page.control("PP", []);
        page.control("EX", []);
        yaml.iter().for_each(|line| {
            page.text([roman(*line)]);
        });
        page.control("EE", []);
    }
    page.control("SH", ["SEE ALSO"]);
    page.text([bold("cuckoo-machinery"), roman("(1)")]);
    page.to_roff()
}

/// Keys that the file has together, with their description.
struct Block<'a> {
    keys: Vec<&'a str>,
    text: String,
    yaml: Vec<&'a str>,
}

impl<'a> Block<'a> {
    /// Parses a paragraph of the commented file: a description, and the YAML that follows it.
    fn parse(paragraph: &'a str) -> Self {
        let lines: Vec<&str> =
            paragraph.lines().map(|line| line.strip_prefix("# ").unwrap_or(line)).collect();
        let first = lines.iter().position(|line| key(line).is_some()).unwrap_or(lines.len());
        let (text, yaml) = lines.split_at(first);
        Block {
            keys: yaml.iter().filter_map(|line| key(line)).collect(),
            text: text.join(" "),
            yaml: yaml.to_vec(),
        }
    }
}

/// Returns the key at the begin of a line of YAML. A description has no word that a colon follows at its begin.
fn key(line: &str) -> Option<&str> {
    let (key, _) = line.split_once(':')?;
    key.chars().all(|c| c.is_ascii_lowercase() || c == '_').then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_has_its_description_and_all_its_keys() {
        let Block { keys, text, yaml } =
            Block::parse("# First line,\n# and `a: b`.\n# one: 1\n# two:\n#   three: 3");
        assert_eq!((keys, text.as_str()), (vec!["one", "two"], "First line, and `a: b`."));
        assert_eq!(yaml, ["one: 1", "two:", "  three: 3"]);
    }

    #[test]
    fn page_of_the_file_has_each_key() {
        let page = host_yaml();
        for key in ["timeouts", "heal", "metrics_listen", "metrics_textfile", "capture_jail", "machineries"] {
            assert!(
                page.contains(&format!("\n{key}: ")) || page.contains(&format!("\n{key}:\n")),
                "{key}: {page}"
            );
        }
    }
}
