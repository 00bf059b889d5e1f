//! A loaded machinery, and the calls of its methods.

use std::collections::HashSet;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::reply::into_result;
use crate::abi::{MachineryObject, ReloadRequest, from_json, plugin, text, to_json};
use crate::config::is_machine_name;
use crate::services::path_text;
use crate::text::{MAX_KEPT, cut};
use crate::{
    Capabilities, Deadline, Diagnosis, DumpFormat, Error, ErrorKind, MachineInfo, Machinery, Reloaded,
    Result, Setup, State,
};

/// The last of the standard streams' descriptors.
const STANDARD_ERROR: i32 = 2;

/// A loaded machinery, with the methods of [`Machinery`](crate::Machinery). They return an error and never panic,
/// whatever the plugin does.
pub struct Instance {
    object: MachineryObject,
}

impl Instance {
    pub(super) fn new(object: MachineryObject) -> Self {
        Instance { object }
    }

    /// Returns a machinery of this process, without a library. A host tests itself with it.
    pub fn in_process(machinery: impl Machinery) -> Self {
        Instance::new(plugin::object(machinery))
    }

    /// See [`Machinery::version`](crate::Machinery::version).
    ///
    /// # Errors
    /// The plugin's.
    pub fn version(&self, deadline: Deadline) -> Result<String> {
        let version = into_result(self.object.version(ms(deadline)))?;
        Ok(cut(text(version.as_rstr(), "plugin's version")?.to_owned(), MAX_KEPT))
    }

    /// See [`Machinery::capabilities`](crate::Machinery::capabilities).
    ///
    /// # Errors
    /// The plugin panicked or misbehaved.
    pub fn capabilities(&self) -> Result<Capabilities> {
        from_json(into_result(self.object.capabilities())?.as_bytes(), "plugin's capabilities")
    }

    /// See [`Machinery::machines`](crate::Machinery::machines).
    ///
    /// # Errors
    /// The plugin panicked or misbehaved, such as by listing an invalid name.
    pub fn machines(&self) -> Result<Vec<MachineInfo>> {
        let machines: Vec<MachineInfo> =
            from_json(into_result(self.object.machines())?.as_bytes(), "plugin's list of machines")?;
        match machines.iter().find(|machine| !is_machine_name(&machine.name)) {
            None => Ok(machines),
            Some(MachineInfo { name, .. }) => {
                let name = cut(name.clone(), 100);
                Err(Error::misbehaved(format!("the plugin lists a machine with an invalid name: {name:?}")))
            }
        }
    }

    /// See [`Machinery::state`](crate::Machinery::state).
    ///
    /// # Errors
    /// The plugin's, or the state is unknown.
    pub fn state(&self, machine: &str, deadline: Deadline) -> Result<State> {
        let state = into_result(self.object.state(machine.into(), ms(deadline)))?;
        text(state.as_rstr(), "state")?.parse().map_err(|why: String| {
            Error::unexpected_state(format!("the machine has an unknown state: {why}")).machine(machine)
        })
    }

    /// See [`Machinery::restore_start`](crate::Machinery::restore_start).
    ///
    /// # Errors
    /// The plugin's.
    pub fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        into_result(self.object.restore_start(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::norestore_start`](crate::Machinery::norestore_start).
    ///
    /// # Errors
    /// The plugin's.
    pub fn norestore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        into_result(self.object.norestore_start(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::stop`](crate::Machinery::stop).
    ///
    /// # Errors
    /// The plugin's.
    pub fn stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        into_result(self.object.stop(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::acpi_stop`](crate::Machinery::acpi_stop).
    ///
    /// # Errors
    /// The plugin's.
    pub fn acpi_stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        into_result(self.object.acpi_stop(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::dump_memory`](crate::Machinery::dump_memory).
    ///
    /// # Errors
    /// The plugin's, or the path is not UTF-8.
    pub fn dump_memory(
        &self,
        machine: &str,
        path: &Path,
        format: DumpFormat,
        deadline: Deadline,
    ) -> Result<()> {
        let path = path_text(path)?.into();
        into_result(self.object.dump_memory(machine.into(), path, format.as_str().into(), ms(deadline)))
    }

    /// See [`Machinery::screenshot`](crate::Machinery::screenshot).
    ///
    /// # Errors
    /// The plugin's, or the path is not UTF-8.
    pub fn screenshot(&self, machine: &str, path: &Path, deadline: Deadline) -> Result<()> {
        into_result(self.object.screenshot(machine.into(), path_text(path)?.into(), ms(deadline)))
    }

    /// See [`Machinery::prepare`](crate::Machinery::prepare).
    ///
    /// # Errors
    /// The plugin's.
    pub fn prepare(&self, machine: &str, deadline: Deadline) -> Result<()> {
        into_result(self.object.prepare(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::prepare_automatically`](crate::Machinery::prepare_automatically).
    ///
    /// # Errors
    /// The plugin's.
    pub fn prepare_automatically(&self, machine: &str, deadline: Deadline) -> Result<()> {
        into_result(self.object.prepare_automatically(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::reload`](crate::Machinery::reload).
    ///
    /// # Errors
    /// The plugin's; a plugin of interface 1.0 does not support it.
    pub fn reload(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        let request = ReloadRequest { setup: setup.clone(), in_use: in_use.to_vec() };
        let request = to_json(&request)?;
        from_json(
            into_result(self.object.reload(request.as_rstr(), ms(deadline)))?.as_bytes(),
            "plugin's reload",
        )
    }

    /// See [`Machinery::diagnose`](crate::Machinery::diagnose). A plugin of interface 1.0 returns no
    /// diagnoses.
    ///
    /// # Errors
    /// The plugin's, or it diagnoses a machine that is not in `machines`.
    pub fn diagnose(&self, machines: &[String], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let request = to_json(&machines)?;
        let diagnoses = match into_result(self.object.diagnose(request.as_rstr(), ms(deadline))) {
            Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(Vec::new()),
            answer => from_json::<Vec<Diagnosis>>(answer?.as_bytes(), "plugin's diagnosis")?,
        };
        expect_requested(&diagnoses, machines)?;
        Ok(diagnoses.into_iter().map(Diagnosis::cut).collect())
    }

    /// See [`Machinery::adopt`](crate::Machinery::adopt).
    ///
    /// # Errors
    /// The plugin's; a plugin of interface 1.0 does not support it.
    pub fn adopt(&self, machine: &str, deadline: Deadline) -> Result<bool> {
        let adopted = into_result(self.object.adopt(machine.into(), ms(deadline)))?;
        from_json(adopted.as_bytes(), "plugin's adoption")
    }

    /// See [`Machinery::hand_over`](crate::Machinery::hand_over).
    ///
    /// # Errors
    /// As [`adopt`](Instance::adopt).
    pub fn hand_over(&self, deadline: Deadline) -> Result<()> {
        into_result(self.object.hand_over(ms(deadline)))
    }

    /// See [`Machinery::console`](crate::Machinery::console).
    ///
    /// # Errors
    /// The plugin's, or it returns something else than a socket; a plugin without the method does not support it.
    pub fn console(&self, machine: &str, deadline: Deadline) -> Result<UnixStream> {
        let number = into_result(self.object.console(machine.into(), ms(deadline)))?;
        let refusal = |why: String| {
            Error::misbehaved(format!("the plugin's console is no connection: {why}")).machine(machine)
        };
        // The standard streams are the host's own.
        if number <= STANDARD_ERROR {
            return Err(refusal(format!("descriptor {number}")));
        }
        // SAFETY: the plugin has opened the descriptor for this call, and has passed its ownership.
        let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(number) });
        match stream.local_addr() {
            Ok(_) => Ok(stream),
            Err(error) => Err(refusal(error.to_string())),
        }
    }

    /// See [`Machinery::open_network`](crate::Machinery::open_network).
    ///
    /// # Errors
    /// The plugin's; a plugin without the method does not support it.
    pub fn open_network(&self, machine: &str, deadline: Deadline) -> Result<()> {
        into_result(self.object.open_network(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::close_network`](crate::Machinery::close_network).
    ///
    /// # Errors
    /// The plugin's; a plugin without the method does not support it.
    pub fn close_network(&self, machine: &str, deadline: Deadline) -> Result<()> {
        into_result(self.object.close_network(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::save`](crate::Machinery::save).
    ///
    /// # Errors
    /// The plugin's, or a path is not UTF-8; a plugin without the method does not support it.
    pub fn save(&self, machine: &str, memory: &Path, disk: &Path, deadline: Deadline) -> Result<()> {
        let (memory, disk) = (path_text(memory)?.into(), path_text(disk)?.into());
        into_result(self.object.save(machine.into(), memory, disk, ms(deadline)))
    }

    /// See [`Machinery::shutdown`](crate::Machinery::shutdown).
    ///
    /// # Errors
    /// The plugin's.
    pub fn shutdown(&self, deadline: Deadline) -> Result<()> {
        into_result(self.object.shutdown(ms(deadline)))
    }
}

/// Expects at most one diagnosis of each machine in `machines`, and none of any other.
fn expect_requested(diagnoses: &[Diagnosis], machines: &[String]) -> Result<()> {
    let mut requested: HashSet<&str> = machines.iter().map(String::as_str).collect();
    match diagnoses.iter().find(|diagnosis| !requested.remove(diagnosis.machine.as_str())) {
        None => Ok(()),
        Some(Diagnosis { machine, .. }) => {
            let name = cut(machine.clone(), 100);
            Err(Error::misbehaved(format!(
                "the plugin diagnoses a machine twice, or one that was not requested: {name:?}"
            )))
        }
    }
}

fn ms(deadline: Deadline) -> u64 {
    u64::try_from(deadline.remaining().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn diagnosis_is_refused_when_it_is_of_another_machine() {
        let requested = ["a".to_owned(), "b".to_owned()];
        let of = |names: &[&str]| {
            let diagnoses: Vec<_> = names.iter().copied().map(Diagnosis::new).collect();
            expect_requested(&diagnoses, &requested).map_err(|error| error.kind())
        };
        assert_eq!((of(&[]), of(&["b", "a"])), (Ok(()), Ok(())));
        for wrong in [&["c"][..], &["a", "a"], &["a", ""]] {
            assert_eq!(of(wrong), Err(ErrorKind::PluginMisbehaved), "{wrong:?}");
        }
    }
}
