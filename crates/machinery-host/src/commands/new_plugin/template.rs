//! The plugins of this repository that a new one is a copy of.

/// A plugin to copy. Its paths and texts have its name, which is replaced.
#[derive(Debug)]
pub struct Template {
    name: &'static str,
    /// The manifest, in which `{ INTERFACE }` is the source of a crate of this repository.
    pub manifest: &'static str,
    /// The other files, by path.
    files: &'static [(&'static str, &'static str)],
}

impl Template {
    /// Machines that exist in memory only.
    pub const MEMORY: Template = Template {
        name: "example",
        manifest: include_str!("memory/manifest.toml"),
        files: &[
            ("src/lib.rs", include_str!("../../../../../plugins/example/src/lib.rs")),
            ("src/adapter.rs", include_str!("../../../../../plugins/example/src/adapter.rs")),
            ("src/config.rs", include_str!("../../../../../plugins/example/src/config.rs")),
            ("src/hypervisor.rs", include_str!("../../../../../plugins/example/src/hypervisor.rs")),
            ("src/machine.rs", include_str!("../../../../../plugins/example/src/machine.rs")),
            ("src/shared.rs", include_str!("../../../../../plugins/example/src/shared.rs")),
            ("tests/conformance.rs", include_str!("../../../../../plugins/example/tests/conformance.rs")),
            ("tests/conformance.yaml", include_str!("../../../../../plugins/example/tests/conformance.yaml")),
            ("example.yaml", include_str!("../../../../../conf/machineries/example.yaml")),
            ("README.md", include_str!("memory/README.md")),
            (".gitignore", "/target\n"),
            ("clippy.toml", include_str!("../../../../../clippy.toml")),
        ],
    };

    /// Machines that are processes.
    pub const PROCESS: Template = Template {
        name: "example-process",
        manifest: include_str!("process/manifest.toml"),
        files: &[
            ("src/lib.rs", include_str!("../../../../../plugins/example-process/src/lib.rs")),
            ("src/adapter.rs", include_str!("../../../../../plugins/example-process/src/adapter.rs")),
            ("src/config.rs", include_str!("../../../../../plugins/example-process/src/config.rs")),
            ("src/hypervisor.rs", include_str!("../../../../../plugins/example-process/src/hypervisor.rs")),
            ("src/machine.rs", include_str!("../../../../../plugins/example-process/src/machine.rs")),
            ("src/shared.rs", include_str!("../../../../../plugins/example-process/src/shared.rs")),
            ("guest/main.rs", include_str!("../../../../../plugins/example-process/guest/main.rs")),
            ("tests/accidents.rs", include_str!("../../../../../plugins/example-process/tests/accidents.rs")),
            (
                "tests/conformance.rs",
                include_str!("../../../../../plugins/example-process/tests/conformance.rs"),
            ),
            (
                "tests/conformance.yaml",
                include_str!("../../../../../plugins/example-process/tests/conformance.yaml"),
            ),
            ("example-process.yaml", include_str!("process/example-process.yaml")),
            ("README.md", include_str!("process/README.md")),
            (".gitignore", "/target\n"),
            ("clippy.toml", include_str!("../../../../../clippy.toml")),
        ],
    };

    /// Returns the paths and the texts of all files but the manifest, with that name.
    pub fn renamed_files(&self, name: &str) -> impl Iterator<Item = (String, String)> {
        self.files.iter().map(move |(path, text)| (self.renamed(path, name), self.renamed(text, name)))
    }

    /// Replaces the name of the plugin in a text.
    pub fn renamed(&self, text: &str, name: &str) -> String {
        // The new name may contain the old one. No file has this character.
        let library = text.replace(&library_name(self.name), "\0");
        let renamed = library.replace(self.name, name).replace(&camel_case(self.name), &camel_case(name));
        renamed.replace('\0', &library_name(name))
    }

    /// Returns the name of the library's file.
    pub fn library(&self, name: &str) -> String {
        format!("lib{}.so", library_name(name))
    }
}

/// Cargo replaces `-` with `_` in library names.
fn library_name(name: &str) -> String {
    format!("machinery_{}", name.replace('-', "_"))
}

fn camel_case(name: &str) -> String {
    let capital = |word: &str| match word.split_at_checked(1) {
        Some((first, rest)) => first.to_uppercase() + rest,
        None => String::new(),
    };
    name.split(['-', '_']).map(capital).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The manifests are written by hand, so their dependencies are compared with those of the plugins.
    #[test]
    fn manifest_has_the_dependencies_of_its_plugin_in_the_workspaces_versions() {
        let memory = include_str!("../../../../../plugins/example/Cargo.toml");
        let process = include_str!("../../../../../plugins/example-process/Cargo.toml");
        let workspace = include_str!("../../../../../Cargo.toml");
        for (template, plugin) in [(Template::MEMORY, memory), (Template::PROCESS, process)] {
            let (_, dependencies) = plugin.split_once("[dependencies]").unwrap();
            let names: Vec<&str> =
                dependencies.lines().filter_map(|line| line.strip_suffix(".workspace = true")).collect();
            assert!(names.len() >= 5, "{names:?}");
            for name in names {
                let beginning = format!("{name} = ");
                let line = workspace.lines().find(|line| line.starts_with(&beginning)).unwrap();
                let own = if line.contains("path = ") { "{ INTERFACE }" } else { &line[beginning.len()..] };
                assert!(template.manifest.contains(&format!("\n{beginning}{own}\n")), "{line}");
            }
            for key in ["edition", "rust-version"] {
                let line = workspace.lines().find(|line| line.starts_with(key)).unwrap();
                assert!(template.manifest.lines().any(|own| own == line), "{line}");
            }
        }
    }

    #[test]
    fn template_has_all_source_files_of_its_plugin() {
        let plugins = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins"));
        for template in [Template::MEMORY, Template::PROCESS] {
            for folder in ["src", "guest", "tests"] {
                let entries = plugins.join(template.name).join(folder).read_dir().into_iter().flatten();
                for file in entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()) {
                    let path = format!("{folder}/{file}");
                    assert!(template.files.iter().any(|(known, _)| *known == path), "{path}");
                }
            }
        }
    }
}
