//! Everything that machines with the same template share: the turn to build it, its failures, and its RAM in memory.
//!
//! ```text
//! machine a ─▶ turn ─▶ builds ─▶ template
//! machine b ─▶ waits ─────────────▶ uses it; builds if a has failed or was cancelled
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, Weak};

use machinery::{Deadline, Result};
use machinery_backend::sync::{lock, wait_while};
use machinery_backend::{Cancellation, OverlayTemplates};
use machinery_images::FileId;

use super::build_failures::BuildFailures;
use super::memory::no_memory;
use super::sealed_ram::seal_copy;
use super::store::Template;
use crate::launch::{Memory, Sharing};

/// The templates that machines of one host share, by name.
#[derive(Default)]
pub struct SharedTemplates(Mutex<HashMap<String, Weak<SharedTemplate>>>);

/// Everything that the machines of one template share.
#[derive(Default)]
pub struct SharedTemplate {
    /// True while a machine builds the template.
    is_built: Mutex<bool>,
    changed: Condvar,
    pub failures: BuildFailures,
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

/// The turn to build a template, until it is dropped.
pub struct Turn(Arc<SharedTemplate>);

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
}

impl SharedTemplate {
    /// Waits until no other machine builds the template. The turn passes on when its holder fails or is cancelled.
    ///
    /// # Errors
    /// The operation is cancelled, or the deadline passes.
    pub fn turn(self: &Arc<Self>, cancellation: &Cancellation, deadline: Deadline) -> Result<Turn> {
        let waiting = Arc::downgrade(self);
        cancellation.on_cancel(move || waiting.upgrade().iter().for_each(|template| template.wake()));
        let waits = |is_built: &mut bool| *is_built && !cancellation.is_cancelled();
        let mut is_built = wait_while(&self.changed, lock(&self.is_built), deadline, waits);
        cancellation.ensure_wanted()?;
        if *is_built {
            return Err(deadline.timeout("another machine to build the template of both"));
        }
        *is_built = true;
        Ok(Turn(Arc::clone(self)))
    }

    fn wake(&self) {
        // A machine that is about to wait has the lock until it waits.
        drop(lock(&self.is_built));
        self.changed.notify_all();
    }

    /// Replaces the template's RAM file by a copy in memory that nobody can change. The copy is made once, and kept while
    /// the template is the same.
    ///
    /// # Errors
    /// There is not enough memory, or the file cannot be read.
    pub fn in_memory(&self, template: Template, ensure_wanted: &dyn Fn() -> Result<()>) -> Result<Template> {
        let mut ram = lock(&self.ram);
        if ram.as_ref().is_none_or(|ram| ram.of != template.ram) {
            // The old copy is freed first.
            *ram = None;
            let file = seal_copy(&template.memory.file, template.disk, ensure_wanted)?;
            *ram = Some(SealedRam { of: template.ram.clone(), file });
        }
        let Some(SealedRam { file, .. }) = &*ram else { return Ok(template) };
        let file = file.try_clone().map_err(|error| no_memory(&error))?;
        let memory = Memory { file, sharing: Sharing::Sealed, ..template.memory };
        Ok(Template { memory, ..template })
    }

    /// Frees the copy in memory, once no run maps it any more.
    pub fn forget_memory(&self) {
        *lock(&self.ram) = None;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *lock(&self.0.is_built) = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::Devices;
    use machinery::{Error, ErrorKind};
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    /// Creates a template whose RAM has that text.
    fn template(folder: &Path, ram: &str) -> Template {
        let path = folder.join(ram);
        fs::write(&path, ram).unwrap();
        let open = || File::open(&path).unwrap();
        let (size, block) = (ram.len() as u64, "pc.ram".to_owned());
        Template {
            memory: Memory { file: open(), size, block, sharing: Sharing::Mapped },
            devices: Devices { path: path.clone(), file: open() },
            ram: FileId::of(&path).unwrap(),
            disk: size,
        }
    }

    #[test]
    fn copy_in_memory_is_made_once_until_the_template_changes() {
        let folder = tempfile::tempdir().unwrap();
        let shared = SharedTemplates::default().of("a");
        let copy = |ram: &str| {
            let copy = shared.in_memory(template(folder.path(), ram), &|| Ok(())).unwrap().memory;
            assert_eq!(copy.sharing, Sharing::Sealed);
            let content = fs::read_to_string(format!("/proc/self/fd/{}", copy.file.as_raw_fd())).unwrap();
            (content, copy.file.metadata().unwrap().ino())
        };
        let same = template(folder.path(), "one");
        let [one, again] = [(); 2].map(|()| {
            let found = Template { ram: same.ram.clone(), ..template(folder.path(), "one") };
            shared.in_memory(found, &|| Ok(())).unwrap().memory.file.metadata().unwrap().ino()
        });
        assert_eq!(one, again);
        let (content, other) = copy("two");
        assert_eq!(content, "two");
        assert_ne!(other, one);
        shared.forget_memory();
        assert!(lock(&shared.ram).is_none());
        let cancelled = shared.in_memory(same, &|| Err(Error::failed("cancelled")));
        assert!(cancelled.err().unwrap().to_string().contains("cancelled"));
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

    #[test]
    fn turn_passes_on_when_its_holder_drops_it() {
        let template = SharedTemplates::default().of("a");
        let first = template.turn(&Cancellation::default(), soon()).unwrap();
        let (sender, order) = mpsc::channel();
        let (other, of_other) = (Arc::clone(&template), sender.clone());
        let second = thread::spawn(move || {
            let _turn = other.turn(&Cancellation::default(), soon()).unwrap();
            of_other.send("second").unwrap();
        });
        let late = template.turn(&Cancellation::default(), Deadline::after(Duration::from_millis(5)));
        assert_eq!(late.err().unwrap().kind(), ErrorKind::Timeout);
        sender.send("first").unwrap();
        drop(first);
        second.join().unwrap();
        assert_eq!([order.recv().unwrap(), order.recv().unwrap()], ["first", "second"]);
    }

    #[test]
    fn waiting_machine_gives_up_when_it_is_cancelled() {
        let template = SharedTemplates::default().of("a");
        let _first = template.turn(&Cancellation::default(), soon()).unwrap();
        let (cancellation, other) = (Cancellation::default(), Arc::clone(&template));
        let waiting = cancellation.clone();
        let second = thread::spawn(move || other.turn(&waiting, soon()).err().unwrap());
        cancellation.cancel();
        assert_eq!(second.join().unwrap().kind(), ErrorKind::Interrupted);
    }
}
