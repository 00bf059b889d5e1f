//! Warnings about keys that have a new name.

use serde_yaml::Mapping;

use super::file::ConfigFile;

/// Returns one message, with file and line, for each old key in the mapping under the keys of `at`.
///
/// `renamed` lists pairs of the old and the new key. A plugin accepts the old key with serde's `alias`, logs
/// each message as a warning in [`Machinery::load`](crate::Machinery::load), and adds it as a warning in
/// [`Machinery::check`](crate::Machinery::check). The result is empty if the file has no such mapping, or is
/// not YAML: [`ConfigFile::parse_at`] reports that.
pub fn renamed_keys(file: &ConfigFile, at: &[&str], renamed: &[(&str, &str)]) -> Vec<String> {
    let Ok(Some(mapping)) = file.parse_at::<Mapping>(at) else { return Vec::new() };
    let found = renamed.iter().filter(|(old, _)| mapping.contains_key(*old));
    found.map(|(old, new)| message(file, at, old, new)).collect()
}

fn message(file: &ConfigFile, at: &[&str], old: &str, new: &str) -> String {
    let key = [at, &[old]].concat();
    let reason = format!("this key is now called `{new}`; the old name is accepted until the next release");
    file.error(&key, reason).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RENAMED: &[(&str, &str)] = &[("template_dir", "instant_dir"), ("save_images", "instant")];

    fn file(text: &str) -> ConfigFile {
        ConfigFile { path: "/c/conf/machinery-host.yaml".into(), text: text.into() }
    }

    #[test]
    fn renamed_key_is_reported_with_its_line_and_its_new_name() {
        let file =
            file("template_dir: /x\nmachineries:\n  kvm: {}\n  qemu:\n    template_dir: /t\n    1: 2\n");
        assert_eq!(
            renamed_keys(&file, &["machineries", "qemu"], RENAMED),
            ["/c/conf/machinery-host.yaml:5: machineries.qemu.template_dir: this key is now called \
              `instant_dir`; the old name is accepted until the next release"]
        );
    }

    #[test]
    fn renamed_keys_are_found_at_the_top_of_a_file() {
        let messages = renamed_keys(&file("save_images: true\ntemplate_dir: /x\n"), &[], RENAMED);
        assert_eq!(messages.len(), 2);
        assert!(messages[0].starts_with("/c/conf/machinery-host.yaml:2: template_dir: "), "{messages:?}");
        assert!(messages[1].contains("`instant`"), "{messages:?}");
    }

    #[test]
    fn renamed_keys_report_nothing_when_no_old_key_is_there() {
        for text in
            ["", "machineries:\n", "machineries: {qemu: {instant_dir: /x}}\n", "machineries: [\n", "- a\n"]
        {
            assert_eq!(renamed_keys(&file(text), &["machineries", "qemu"], RENAMED), [""; 0], "{text:?}");
        }
    }
}
