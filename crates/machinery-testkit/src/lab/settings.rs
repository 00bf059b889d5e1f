//! The settings of a lab's host.

use std::collections::BTreeSet;

use machinery_jail::Support;

/// The content of `machinery-host.yaml`.
#[derive(Debug)]
pub struct HostSettings {
    /// The jail of all machines: the strictest that this computer allows, unless a test changes it.
    pub jail: &'static str,
    /// The key `heal`. Off, unless a test is about that: a machine that has failed is left as it is.
    pub heal: &'static str,
    /// Keys of the host, and keys of the machinery.
    pub keys: (String, String),
    /// The machines whose unsafe arguments are accepted.
    pub unsafe_args: BTreeSet<String>,
}

impl Default for HostSettings {
    fn default() -> Self {
        let strict = Support::of_this_host().missing_in_b().is_none();
        let jail = if strict { "strict" } else { "auto" };
        HostSettings { jail, heal: "off", keys: Default::default(), unsafe_args: BTreeSet::new() }
    }
}

impl HostSettings {
    /// Returns the text of the file.
    pub fn text(&self) -> String {
        let ((host, qemu), machines) = (&self.keys, &self.unsafe_args);
        let accepted = machines.iter().map(|name| format!("{name}: {{unsafe_start_args: true}}"));
        let machines = match accepted.collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => none,
            accepted => format!(", machines: {{{accepted}}}"),
        };
        // A test does not depend on the free space of its computer, unless it is about that.
        let reserve = if host.contains("free_space_reserve") { "" } else { "free_space_reserve: 0\n" };
        format!(
            "heal: {}\n{reserve}{host}\nmachineries: {{qemu: {{jail: {}, {qemu}{machines}}}}}\n",
            self.heal, self.jail
        )
    }
}
