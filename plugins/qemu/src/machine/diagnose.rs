//! Diagnoses whether the machine can be used.

use machinery::Diagnosis;
use machinery_backend::Backend;

use super::base::Machine;
use crate::config::MachineFiles;
use crate::diagnose::{faults, file_warnings};
use crate::machineinfo::StartArgs;

impl Machine {
    /// Diagnoses the machine by its files as they are now. Arguments that could not be read with the
    /// configuration are read as soon as that is possible.
    pub(super) fn diagnose_files(&self) -> Diagnosis {
        let mut diagnosis = Diagnosis::new(self.name());
        let files = self.files();
        let now = match StartArgs::read(&files.machineinfo, self.name()) {
            Err(error) => MachineFiles { args_error: Some(error), ..files.clone() },
            Ok(start_args) if files.args_error.is_some() => {
                let corrected = MachineFiles { start_args, args_error: None, ..files.clone() };
                // Once `corrected` is set, this error no longer occurs.
                self.corrected.get_or_init(|| corrected).clone()
            }
            Ok(start_args) => {
                if start_args != files.start_args {
                    diagnosis.warn("its machineinfo.json has changed since it was read: reload to use it");
                }
                files.clone()
            }
        };
        for (_, error) in faults(&now) {
            diagnosis.keep::<()>(Err(error));
        }
        now.unsafe_args_warning().into_iter().for_each(|warning| diagnosis.warn(warning));
        now.shared_writes_warning().into_iter().for_each(|warning| diagnosis.warn(warning));
        file_warnings(&now).into_iter().for_each(|warning| diagnosis.warn(warning));
        // The files of a machine that is on are no leftovers.
        if self.expect_no_leftovers().is_err() && self.is_idle_without_qemu() {
            diagnosis.keep(self.clear_leftovers());
        }
        diagnosis.keep(self.expect_no_leftovers());
        diagnosis
    }
}
