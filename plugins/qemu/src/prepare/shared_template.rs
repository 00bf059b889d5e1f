//! Everything that machines with the same template share: the turn to build it, its failures, and its RAM in memory.
//!
//! ```text
//! machine a ─▶ turn ─▶ builds ─▶ template
//! machine b ─▶ waits ─────────────▶ uses it; builds if a has failed or was cancelled
//! ```
//!
//! A machine that cannot load the template may be at fault itself. The template is at fault if another machine cannot load
//! it either, and none has loaded it in between.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, Weak};

use machinery::{Deadline, Result};
use machinery_backend::sync::lock;
use machinery_backend::{Cancellation, OverlayTemplates};
use machinery_images::FileId;

use super::memory::no_memory;
use super::sealed_ram::seal_copy;
use super::store::Template;
use super::template_failures::TemplateFailures;
use super::turn::{Turn, Turns};
use crate::launch::{Memory, Sharing};

/// The templates that machines of one host share, by name.
#[derive(Default)]
pub struct SharedTemplates(Mutex<HashMap<String, Weak<SharedTemplate>>>);

/// Everything that the machines of one template share.
#[derive(Default)]
pub struct SharedTemplate {
    building: Turns,
    copying: Turns,
    /// The failures of its builds, and of templates that several machines could not load.
    pub failures: TemplateFailures,
    /// The RAM file of the template, and the machine, that was the last to fail to load it, unless another has succeeded.
    last_failed: Mutex<Option<(FileId, String)>>,
    /// The empty overlays that the overlays of all runs are copied from.
    pub overlays: OverlayTemplates,
    ram: Mutex<Option<SealedRam>>,
}

/// The RAM of a template in memory, which nobody can change any more.
struct SealedRam {
    /// The identity of the template's RAM file.
    of: FileId,
    file: File,
}

impl SharedTemplates {
    /// Returns what the machines of that template share.
    pub fn of(&self, name: &str) -> Arc<SharedTemplate> {
        let mut all = lock(&self.0);
        all.retain(|_, template| template.strong_count() > 0);
        if let Some(template) = all.get(name).and_then(Weak::upgrade) {
            return template;
        }
        let template = Arc::new(SharedTemplate::default());
        all.insert(name.to_owned(), Arc::downgrade(&template));
        template
    }

    /// Frees the memory of all templates but those of these names. Runs keep what they have mapped.
    pub fn keep_only(&self, names: &[&str]) {
        let all = lock(&self.0);
        let others = all.iter().filter(|(name, _)| !names.contains(&name.as_str()));
        others.filter_map(|(_, template)| template.upgrade()).for_each(|template| template.forget_memory());
    }
}

impl SharedTemplate {
    /// Waits until no other machine builds the template.
    ///
    /// # Errors
    /// As [`Turns::wait`].
    pub fn turn(&self, cancellation: &Cancellation, deadline: Deadline) -> Result<Turn> {
        self.building.wait("build the template of both", cancellation, deadline)
    }

    /// Replaces the template's RAM file by a copy in memory that nobody can change. The copy is made once, and kept while
    /// the template is the same.
    ///
    /// # Errors
    /// There is not enough memory, the file cannot be read, the operation is cancelled, or the deadline passes.
    pub fn in_memory(
        &self,
        template: Template,
        cancellation: &Cancellation,
        deadline: Deadline,
    ) -> Result<Template> {
        let file = match self.copy_of(&template.ram)? {
            Some(file) => file,
            None => {
                let _turn =
                    self.copying.wait("load the template of both into memory", cancellation, deadline)?;
                // Another machine may have made the copy meanwhile.
                match self.copy_of(&template.ram)? {
                    Some(file) => file,
                    None => self.copy(&template, cancellation, deadline)?,
                }
            }
        };
        let memory = Memory { file, sharing: Sharing::Sealed, ..template.memory };
        Ok(Template { memory, ..template })
    }

    /// Returns the copy of that RAM file, if there is one.
    fn copy_of(&self, ram: &FileId) -> Result<Option<File>> {
        let copied = lock(&self.ram);
        let copy = copied.as_ref().filter(|copied| copied.of == *ram).map(|copied| copied.file.try_clone());
        copy.transpose().map_err(|error| no_memory(&error))
    }

    fn copy(&self, template: &Template, cancellation: &Cancellation, deadline: Deadline) -> Result<File> {
        // The old copy is freed first.
        self.forget_memory();
        let copied = seal_copy(&template.memory.file, template.disk, &|| {
            cancellation.ensure_wanted()?;
            deadline.check("the template to be loaded into memory")
        })?;
        let file = copied.try_clone().map_err(|error| no_memory(&error))?;
        // Another machine may have dropped the template meanwhile.
        if template.ram.is_unchanged() {
            *lock(&self.ram) = Some(SealedRam { of: template.ram.clone(), file: copied });
        }
        Ok(file)
    }

    /// Notes that the machine has loaded the template, which is good.
    pub fn loaded(&self) {
        self.failures.clear();
        *lock(&self.last_failed) = None;
    }

    /// Notes that the machine could not load the template with that RAM file; reports whether the template is at fault.
    pub fn is_at_fault(&self, ram: &FileId, machine: &str) -> bool {
        let mut last = lock(&self.last_failed);
        let others = last.replace((ram.clone(), machine.to_owned()));
        others.is_some_and(|(failed, other)| failed == *ram && other != machine)
    }

    /// Frees the copy in memory, once no run maps it any more.
    pub fn forget_memory(&self) {
        *lock(&self.ram) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::Devices;
    use machinery::ErrorKind;
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::thread;
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    /// Creates a template whose RAM has that text.
    fn template(folder: &Path, ram: &str) -> Template {
        let path = folder.join(ram);
        if !path.exists() {
            fs::write(&path, ram).unwrap();
        }
        let open = || File::open(&path).unwrap();
        let (size, block) = (ram.len() as u64, "pc.ram".to_owned());
        Template {
            memory: Memory { file: open(), size, block, sharing: Sharing::Mapped },
            devices: Devices { path: path.clone(), file: open() },
            ram: FileId::of(&path).unwrap(),
            disk: size,
        }
    }

    fn copy(shared: &SharedTemplate, template: Template) -> Result<Memory> {
        shared.in_memory(template, &Cancellation::default(), soon()).map(|template| template.memory)
    }

    #[test]
    fn copy_in_memory_is_made_once_until_the_template_changes() {
        let folder = tempfile::tempdir().unwrap();
        let shared = SharedTemplates::default().of("a");
        let copy = |ram: &str| {
            let copy = copy(&shared, template(folder.path(), ram)).unwrap();
            assert_eq!(copy.sharing, Sharing::Sealed);
            let content = fs::read_to_string(format!("/proc/self/fd/{}", copy.file.as_raw_fd())).unwrap();
            (content, copy.file.metadata().unwrap().ino())
        };
        let one = copy("one");
        assert_eq!(one, copy("one"));
        let (content, other) = copy("two");
        assert_eq!(content, "two");
        assert_ne!(other, one.1);
    }

    #[test]
    fn copy_in_memory_ends_with_its_deadline_and_its_cancellation() {
        let folder = tempfile::tempdir().unwrap();
        let shared = SharedTemplates::default().of("a");
        let late = shared.in_memory(
            template(folder.path(), "one"),
            &Cancellation::default(),
            Deadline::after(Duration::ZERO),
        );
        assert_eq!(late.err().unwrap().kind(), ErrorKind::Timeout);
        let cancellation = Cancellation::default();
        cancellation.cancel();
        let cancelled = shared.in_memory(template(folder.path(), "one"), &cancellation, soon());
        assert_eq!(cancelled.err().unwrap().kind(), ErrorKind::Interrupted);
        assert!(lock(&shared.ram).is_none());
        copy(&shared, template(folder.path(), "one")).unwrap();
    }

    #[test]
    fn machine_that_waits_for_the_copy_of_another_gives_up_when_it_is_cancelled() {
        let folder = tempfile::tempdir().unwrap();
        let shared = SharedTemplates::default().of("a");
        let _copying = shared.copying.wait("copy", &Cancellation::default(), soon()).unwrap();
        let (cancellation, other) = (Cancellation::default(), Arc::clone(&shared));
        let (waiting, template) = (cancellation.clone(), template(folder.path(), "one"));
        let second = thread::spawn(move || other.in_memory(template, &waiting, soon()).err().unwrap());
        cancellation.cancel();
        assert_eq!(second.join().unwrap().kind(), ErrorKind::Interrupted);
    }

    #[test]
    fn copy_in_memory_is_freed_when_no_machine_needs_it_and_stays_for_a_run() {
        let folder = tempfile::tempdir().unwrap();
        let all = SharedTemplates::default();
        let shared = all.of("a");
        let of_run = copy(&shared, template(folder.path(), "one")).unwrap();
        all.keep_only(&["a"]);
        assert!(lock(&shared.ram).is_some());
        all.keep_only(&["b"]);
        assert!(lock(&shared.ram).is_none());
        let path = format!("/proc/self/fd/{}", of_run.file.as_raw_fd());
        assert_eq!(fs::read_to_string(path).unwrap(), "one");
    }

    #[test]
    fn template_is_at_fault_when_two_machines_fail_to_load_it_and_none_succeeds() {
        let folder = tempfile::tempdir().unwrap();
        let shared = SharedTemplates::default().of("a");
        let [one, two] = ["one", "two"].map(|ram| template(folder.path(), ram).ram);
        for _ in 0..3 {
            assert!(!shared.is_at_fault(&one, "m"), "the machine itself may be at fault");
        }
        shared.loaded();
        assert!(!shared.is_at_fault(&one, "n"), "another machine has loaded it");
        assert!(!shared.is_at_fault(&two, "m"), "the other one has failed to load another template");
        assert!(shared.is_at_fault(&two, "n"));
    }

    #[test]
    fn template_is_shared_by_its_name_while_a_machine_has_it() {
        let all = SharedTemplates::default();
        let one = all.of("a");
        assert!(Arc::ptr_eq(&one, &all.of("a")));
        assert!(!Arc::ptr_eq(&one, &all.of("b")));
        drop(one);
        all.of("c");
        assert_eq!(lock(&all.0).len(), 1);
    }
}
