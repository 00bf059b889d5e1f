//! Finds the machines that the two files together describe: those of `qemu.yaml`, with clones in place of their base.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use machinery::config::{Configured, Machines, is_machine_name};

use super::clones::{Named, clones_of};
use super::keys::OwnKeys;
use super::section::{NetworkMode, Section};
use super::validator::Validator;
use super::wanted::{Files, Wanted};

impl Validator<'_> {
    /// Returns all machines, and checks the keys of clones and of isolated machines.
    pub fn wanted(&mut self, files: &Files<'_>, machines: &Machines<OwnKeys>) -> Vec<Wanted> {
        let mut templates: HashMap<[&str; 3], &str> = HashMap::new();
        let mut users: HashMap<&str, usize> = HashMap::new();
        for machine in machines.iter() {
            let paths = machine.own.paths().map(|(_, path)| path);
            templates.entry(paths).or_insert(&machine.name);
            paths.iter().for_each(|path| *users.entry(path).or_default() += 1);
        }
        let mut wanted: Vec<Wanted> = Vec::new();
        for machine in machines.iter() {
            let paths = machine.own.paths().map(|(_, path)| path);
            let template = templates.get(&paths).copied().unwrap_or(&machine.name);
            let has_others = paths.iter().any(|path| users.get(path).is_some_and(|count| *count > 1));
            let guest = self.guest_of(machine, files.section);
            let clones = self.clones(files, &machine.name);
            let is_clone = clones.is_some();
            let own = || vec![(machine.name.clone(), machine.shared.ip.clone())];
            for (name, ip) in clones.unwrap_or_else(own) {
                let mut machine = machine.clone();
                let entry = std::mem::replace(&mut machine.name, name);
                machine.shared.ip = ip;
                let is_first = wanted.iter().all(|other| other.template != template);
                let (clone_of, template) = (is_clone.then_some(entry), template.to_owned());
                let is_shared = is_clone || has_others;
                wanted.push(Wanted { machine, clone_of, guest, is_shared, template, is_first });
            }
        }
        self.network_keys(files);
        wanted
    }

    /// Returns the address inside the snapshot of an isolated machine.
    fn guest_of(&mut self, machine: &Configured<OwnKeys>, section: &Section) -> Option<Ipv4Addr> {
        if !section.is_isolated(&machine.name) {
            return None;
        }
        let own = section.machines.get(&machine.name).and_then(|own| own.guest_ip);
        let address = machine.shared.ip.parse();
        if address.is_err() {
            let ip = &machine.shared.ip;
            let reason = format!("'{ip}' is not an IPv4 address, which network: isolated needs");
            let advice = "Write the address that is set inside the guest";
            self.problem(&["machines", &machine.name, "ip"], reason, advice);
        }
        own.or(address.ok())
    }

    /// Returns the clones that replace a machine; none if it is a machine itself.
    fn clones(&mut self, files: &Files<'_>, base: &str) -> Option<Named> {
        let own = files.section.machines.get(base)?;
        let mut problem =
            |key, reason, advice| self.problems.push(files.host_error(base, key, reason).advice(advice));
        let Some(clones) = &own.clones else {
            if own.clone_ips.is_some() {
                let reason = "there are no clones that could have these addresses".to_owned();
                problem("clone_ips", reason, "Add `clones` with their number, or remove the key");
            }
            return None;
        };
        match clones_of(base, clones, own.clone_ips.as_ref()) {
            Ok(clones) => {
                for (name, _) in clones.iter().filter(|(name, _)| !is_machine_name(name)) {
                    let reason = format!("'{name}' cannot be a machine's name");
                    let advice = "Use up to 100 bytes of letters, digits, '-', '_', '.', '@', '+' and space";
                    problem("clones", reason, advice);
                }
                Some(clones)
            }
            Err((key, reason, advice)) => {
                problem(key, reason, advice);
                Some(Named::new())
            }
        }
    }

    /// Checks the keys that only an isolated machine can have.
    fn network_keys(&mut self, files: &Files<'_>) {
        for (name, own) in &files.section.machines {
            if own.clones.is_some() && own.network == Some(NetworkMode::Operator) {
                let reason = "clones have the same address inside, so each needs a network of its own";
                let error = files.host_error(name, "network", reason.to_owned());
                self.problems.push(error.advice("Remove the key, or write network: isolated"));
            }
            if own.guest_ip.is_some() && !files.section.is_isolated(name) {
                let reason = "guest_ip is for a machine whose network is isolated".to_owned();
                let error = files.host_error(name, "guest_ip", reason);
                self.problems.push(error.advice("Add network: isolated, or remove guest_ip"));
            }
        }
    }

    /// Refuses a name or an address that several machines have, and a file of machines that are not isolated. Isolated
    /// machines may have the same MAC address, because each is in a network of its own.
    pub fn duplicates(&mut self, files: &Files<'_>, wanted: &[Wanted], machines: &Machines<OwnKeys>) {
        let mut seen: HashMap<(&str, &str), &Wanted> = HashMap::new();
        for one in wanted {
            let shared = &one.machine.shared;
            let mac = shared.mac_address.as_deref().filter(|_| one.guest.is_none());
            let values =
                [("name", Some(&*one.machine.name)), ("ip", Some(&*shared.ip)), ("mac_address", mac)];
            for (key, value) in values.into_iter().filter_map(|(key, value)| Some((key, value?))) {
                let other = *seen.entry((key, value)).or_insert(one);
                if !std::ptr::eq(other, one) {
                    self.problems.push(one.taken(files, key, value, other));
                }
            }
        }
        let is_isolated = |name: &str| files.section.is_isolated(name);
        let mut seen: HashMap<&str, (&str, &str)> = HashMap::new();
        for machine in machines.iter() {
            for (key, path) in machine.own.paths() {
                let Some((other, other_key)) = seen.insert(path, (&machine.name, key)) else { continue };
                if key == other_key && is_isolated(&machine.name) && is_isolated(other) {
                    continue;
                }
                let reason = format!("{path} is already the {other_key} of machine '{other}'");
                let advice = "Give each machine files of its own, or set network: isolated for both in machinery-host.yaml";
                self.problem(&["machines", &machine.name, key], reason, advice);
            }
        }
    }
}

#[cfg(test)]
mod tests;
