//! Markers of the domains that run because of the host, for the next host.
//!
//! A domain outlives the host that started it. The next host adopts the runs of a killed host, or ends them, but not a
//! domain that an operator has started by hand. So each run has a marker: a file in the machinery's state
//! folder, with a random token. The metadata of the running domain has the same token. Only the live domain
//! has this metadata: it ends with the run, and a domain that somebody else starts has none. A managed save
//! keeps the metadata, so a run that was saved and resumed still matches its marker.
//!
//! ```text
//!   file written ─▶ domain started, paused ─▶ token in its metadata ─▶ file says so ─▶ resumed
//!   └───── any paused domain matches the marker ───────┘ └── a domain with the token matches ──▶
//! ```
//!
//! The guest does not run until the domain has the token, so nobody can work in it before. A standby has a
//! marker as well. A later host adopts a domain whose guest was resumed, and ends every other one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use machinery::{Error, Result, State};
use machinery_backend::files;
use machinery_backend::sync::lock;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt_sys as sys;

use crate::description::Description;
use crate::domain;
use crate::errors::{explain, is_no_domain, is_off};
use crate::owners::{FileOwner, images_of, owners_of};

/// The XML namespace of the token.
const NAMESPACE: &str = "https://github.com/cuckoo-machinery/cuckoo-machinery/run/1";
/// The end of a marker's name.
const SUFFIX: &str = ".run";
/// Keeps the ends of two runs apart, so that one of them gives the files of both back.
static OWNERS: Mutex<()> = Mutex::new(());
/// The prefix of that namespace in a domain's description.
const PREFIX: &str = "machinery";

/// The marker of one machine's run.
#[derive(Debug, Clone)]
pub struct RunMarker {
    path: PathBuf,
    /// The address of the libvirt that later runs are of.
    dsn: Option<String>,
    /// The content of the file, or the content that could not be written.
    run: Arc<Mutex<Option<Run>>>,
}

/// The content of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    /// The domain's uuid.
    uuid: String,
    /// The token in the domain's metadata during this run.
    token: String,
    /// The boot of this computer in which the run was started.
    boot: String,
    /// True if the token is in the metadata.
    marked: bool,
    /// The domain's id once the guest was resumed: the domain is no standby, and its start is not under way. A run that
    /// somebody has saved and resumed has another id.
    #[serde(default)]
    resumed: Option<u32>,
    /// The overlays that the domain writes to. They are removed together with the marker.
    #[serde(default)]
    overlays: Vec<PathBuf>,
    /// The owners of the domain's files before the run. They get them back afterwards.
    #[serde(default)]
    owners: Vec<FileOwner>,
    /// The address of the domain's libvirt; an older host has not recorded it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dsn: Option<String>,
}

impl RunMarker {
    /// Returns the marker of that machine, in the machinery's state folder.
    pub fn of(machine: &str, state_dir: &Path) -> Self {
        RunMarker { path: state_dir.join(format!("{machine}{SUFFIX}")), dsn: None, run: Arc::default() }
    }

    /// Returns the marker of a machine whose domain is at that libvirt.
    pub fn of_libvirt(self, dsn: &str) -> Self {
        RunMarker { dsn: Some(dsn.to_owned()), ..self }
    }

    /// Returns the address of the libvirt of the recorded run, if it is recorded.
    pub fn recorded_dsn(&self) -> Option<String> {
        self.read()?.dsn
    }

    /// Records that the domain is about to be started.
    ///
    /// # Errors
    /// libvirt does not answer; the kernel returns no token.
    pub fn begin(&self, domain: &Domain) -> Result<()> {
        // A run that was saved has left a marker, and overlays.
        self.remove();
        let images = images_to_give_back(domain)?;
        let (uuid, token, boot) = (domain::uuid(domain)?, kernel_id("uuid")?, kernel_id("boot_id")?);
        let _owners = lock(&OWNERS);
        let recorded = if images.is_empty() { Vec::new() } else { self.owners_of_other_runs() };
        let owners = owners_of(&images, &recorded);
        self.write(Run { uuid, token, boot, owners, dsn: self.dsn.clone(), ..Run::default() });
        Ok(())
    }

    /// Records the overlays of the run, before they are made.
    pub fn set_overlays(&self, overlays: Vec<PathBuf>) {
        if let Some(run) = self.read() {
            self.write(Run { overlays, ..run });
        }
    }

    /// Returns the overlays of the run.
    pub fn overlays(&self) -> Vec<PathBuf> {
        self.read().map(|run| run.overlays).unwrap_or_default()
    }

    /// Removes the overlays: the domain has been ended, and is started again without them.
    pub fn remove_overlays(&self) {
        let Some(run) = self.read().filter(|run| !run.overlays.is_empty()) else { return };
        for error in run.overlays.iter().filter_map(|overlay| files::remove_large(overlay).err()) {
            tracing::warn!(%error, "an overlay remains");
        }
        self.write(Run { overlays: Vec::new(), ..run });
    }

    /// Gives the domain's files back to their owners, except those that other runs use.
    fn give_files_back(&self) {
        let Some(run) = self.read().filter(|run| !run.owners.is_empty()) else { return };
        let _owners = lock(&OWNERS);
        let others = self.owners_of_other_runs();
        let is_free = |owner: &&FileOwner| !others.iter().any(|other| other.is_of_same_file(owner));
        for error in run.owners.iter().filter(is_free).filter_map(|owner| owner.give_back().err()) {
            tracing::warn!(%error, "a file of the domain belongs to QEMU's user now");
        }
        self.write(Run { owners: Vec::new(), ..run });
    }

    /// Returns the owners that the markers of other runs in this folder have.
    fn owners_of_other_runs(&self) -> Vec<FileOwner> {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let markers = files::stems(folder, SUFFIX).into_iter().map(|name| RunMarker::of(&name, folder));
        let others = markers.filter(|marker| marker.path != self.path);
        others.filter_map(|marker| marker.read()).flat_map(|run| run.owners).collect()
    }

    /// Marks the domain, which was started for this run and is paused.
    ///
    /// # Errors
    /// The marker is gone; libvirt cannot change the metadata.
    pub fn mark(&self, domain: &Domain) -> Result<()> {
        let gone = || Error::failed(format!("the run marker {} is gone", self.path.display()));
        let run = self.read().ok_or_else(gone)?;
        let element = format!("<run token='{}'/>", run.token);
        domain
            .set_metadata(
                sys::VIR_DOMAIN_METADATA_ELEMENT.cast_signed(),
                Some(&element),
                Some(PREFIX),
                Some(NAMESPACE),
                sys::VIR_DOMAIN_AFFECT_LIVE,
            )
            .map_err(|error| explain("mark the domain", &error))?;
        self.write(Run { marked: true, ..run });
        Ok(())
    }

    /// Records that the guest was resumed.
    pub fn set_resumed(&self, domain: &Domain) {
        if let Some(run) = self.read() {
            self.write(Run { resumed: domain.id(), ..run });
        }
    }

    /// Returns the id that the domain had when its guest was resumed, if it was.
    pub fn resumed_id(&self) -> Option<u32> {
        self.read()?.resumed
    }

    /// Reports whether a run or a standby is recorded.
    pub fn exists(&self) -> bool {
        lock(&self.run).is_some() || self.path.exists()
    }

    /// Reports whether the domain is on because of this host, or of an earlier one.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn matches(&self, domain: &Domain) -> Result<bool> {
        let Some(run) = self.read() else { return Ok(false) };
        if domain::uuid(domain)? != run.uuid {
            return Ok(false);
        }
        if token_of(domain)?.is_some_and(|metadata| metadata.contains(&run.token)) {
            return Ok(true);
        }
        Ok(!run.marked && kernel_id("boot_id")? == run.boot && is_paused(domain)?)
    }

    /// Ends the run of another domain than that of this uuid, and removes its marker: the machine has another domain by
    /// now, or is not configured any more.
    ///
    /// # Errors
    /// libvirt does not answer; the domain does not end.
    pub fn end_run_elsewhere(&self, connect: &Connect, uuid: Option<&str>) -> Result<()> {
        let Some(run) = self.read().filter(|run| Some(run.uuid.as_str()) != uuid) else { return Ok(()) };
        match connect.lookup_domain_by_uuid_string(&run.uuid) {
            Ok(domain) if self.matches(&domain)? => {
                let marker = self.path.display();
                tracing::warn!(%marker, "ending a run whose domain no machine has any more");
                domain::destroy(&domain)?;
            }
            Ok(_) => {}
            Err(error) if is_no_domain(&error) => {}
            Err(error) => return Err(explain("look up the domain", &error)),
        }
        self.remove();
        Ok(())
    }

    /// Keeps the marker of a run at another libvirt than the machine's under another name: only that libvirt knows whether
    /// the run goes on. A later host finds it among the [`orphans`](Self::orphans).
    ///
    /// # Errors
    /// The file cannot be written. The marker stays then.
    pub fn set_aside_if_elsewhere(&self) -> Result<()> {
        let Some(run) = self.read().filter(|run| run.dsn.is_some() && run.dsn != self.dsn) else {
            return Ok(());
        };
        let machine = self.path.file_stem().unwrap_or_default().to_string_lossy();
        let aside = self.path.with_file_name(format!("{machine}@{}{SUFFIX}", run.token));
        files::replace_json(&aside, &run)?;
        tracing::warn!(marker = %aside.display(), dsn = run.dsn, "a run at another libvirt may go on: a later host ends it");
        *lock(&self.run) = None;
        files::remove(&self.path)
    }

    /// Returns the markers in that folder whose runs are of no machine: `dsn_of` returns the address of a machine's libvirt.
    pub fn orphans(state_dir: &Path, dsn_of: impl Fn(&str) -> Option<String>) -> Vec<RunMarker> {
        let marker = |name: String| {
            let (known, marker) = (dsn_of(&name), RunMarker::of(&name, state_dir));
            let recorded = marker.recorded_dsn();
            (known.is_none() || recorded.is_some() && recorded != known).then_some(marker)
        };
        files::stems(state_dir, SUFFIX).into_iter().filter_map(marker).collect()
    }

    /// Removes the marker and the overlays, and gives the domain's files back: the run has ended.
    pub fn remove(&self) {
        self.remove_overlays();
        self.give_files_back();
        *lock(&self.run) = None;
        if let Err(error) = files::remove(&self.path) {
            tracing::warn!(%error, "a run marker remains");
        }
    }

    fn read(&self) -> Option<Run> {
        let known = lock(&self.run).clone();
        known.or_else(|| serde_json::from_str(&fs::read_to_string(&self.path).ok()?).ok())
    }

    /// Writes the file. A failure is only logged: this host still has the content.
    fn write(&self, run: Run) {
        if let Err(error) = files::replace_json(&self.path, &run) {
            tracing::warn!(%error, "cannot write the run marker, so the run would outlive a host that is killed");
        }
        *lock(&self.run) = Some(run);
    }
}

/// Returns the images of the domain that can be given back after a run: none, if this process is not root.
fn images_to_give_back(domain: &Domain) -> Result<Vec<PathBuf>> {
    if !geteuid().is_root() {
        return Ok(Vec::new());
    }
    let xml = domain::xml(domain, sys::VIR_DOMAIN_XML_INACTIVE)?;
    Ok(images_of(&Description::read(&xml)?))
}

/// Returns the token's element in the metadata of the domain, if the domain is on and has one.
fn token_of(domain: &Domain) -> Result<Option<String>> {
    let kind = sys::VIR_DOMAIN_METADATA_ELEMENT.cast_signed();
    match domain.metadata(kind, Some(NAMESPACE), sys::VIR_DOMAIN_AFFECT_LIVE) {
        Ok(element) => Ok(Some(element)),
        Err(error) if is_off(&error) || error.code().is(ErrorNumber::NoDomainMetadata) => Ok(None),
        Err(error) => Err(explain("return the domain's metadata", &error)),
    }
}

/// Reports whether the domain is on, and its guest does not run.
fn is_paused(domain: &Domain) -> Result<bool> {
    let (state, _) = domain::state(domain)?;
    Ok(!matches!(state, State::Running | State::Poweroff))
}

/// Returns one of the kernel's random identifiers: `uuid` is a new one, `boot_id` the one of this boot.
fn kernel_id(name: &str) -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random").join(name);
    let text = fs::read_to_string(&path).map_err(|error| Error::io("read", &path, &error))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use virt::connect::Connect;

    #[test]
    fn marker_outlives_its_host_when_it_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let marker = || RunMarker::of("m", folder.path());
        assert!(marker().read().is_none() && !marker().exists());
        let run =
            Run { uuid: "u".into(), token: "t".into(), boot: "b".into(), marked: true, ..Run::default() };
        marker().write(run.clone());
        assert_eq!(marker().read(), Some(run));
        fs::write(folder.path().join("m.run"), "as an older host wrote it\n").unwrap();
        assert!(marker().read().is_none() && marker().exists());
        marker().remove();
        assert!(!marker().exists());
    }

    #[test]
    fn marker_is_kept_in_memory_when_it_cannot_be_written() {
        let marker = RunMarker::of("m", Path::new("/none"));
        let run = Run { uuid: "u".into(), token: "t".into(), boot: "b".into(), ..Run::default() };
        marker.write(run.clone());
        assert_eq!(marker.read(), Some(run));
        marker.remove();
        assert!(!marker.exists());
    }

    #[test]
    fn overlays_are_removed_with_the_marker_and_when_the_next_run_begins() {
        let connect = Connect::open(Some("test:///default")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let marker = || RunMarker::of("m", folder.path());
        let overlay = folder.path().join("m_disposable.qcow2");
        let domain = started(&connect, "with-overlays");
        let begin = || {
            marker().begin(&domain).unwrap();
            marker().set_overlays(vec![overlay.clone(), folder.path().join("never made")]);
            fs::write(&overlay, "").unwrap();
        };
        begin();
        assert_eq!(marker().overlays().len(), 2, "the next host knows them");
        marker().begin(&domain).unwrap();
        assert!(!overlay.exists() && marker().overlays().is_empty());
        begin();
        marker().remove_overlays();
        assert!(!overlay.exists() && marker().overlays().is_empty() && marker().exists());
        begin();
        marker().remove();
        assert!(!overlay.exists() && !marker().exists());
        domain.destroy().unwrap();
    }

    #[test]
    fn marker_is_an_orphan_when_its_machine_is_gone_or_has_another_libvirt() {
        let folder = tempfile::tempdir().unwrap();
        let run = |dsn: Option<&str>| Run {
            uuid: "u".into(),
            token: "t".into(),
            boot: "b".into(),
            marked: true,
            dsn: dsn.map(str::to_owned),
            ..Run::default()
        };
        for (name, dsn) in
            [("gone", None), ("moved", Some("x:///old")), ("stays", Some("x:///a")), ("earlier", None)]
        {
            RunMarker::of(name, folder.path()).write(run(dsn));
        }
        let known = |name: &str| (name != "gone").then(|| "x:///a".to_owned());
        let mut found: Vec<_> =
            RunMarker::orphans(folder.path(), known).iter().map(|marker| marker.recorded_dsn()).collect();
        found.sort();
        assert_eq!(found, [None, Some("x:///old".to_owned())]);
    }

    #[test]
    fn marker_of_a_run_at_another_libvirt_is_kept_under_another_name() {
        let connect = Connect::open(Some("test:///default")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let marker = |dsn| RunMarker::of("m", folder.path()).of_libvirt(dsn);
        let domain = started(&connect, "elsewhere");
        let (old, new) = (marker("x:///old"), marker("x:///new"));
        old.begin(&domain).unwrap();
        old.set_aside_if_elsewhere().unwrap();
        assert!(old.exists(), "it is the machine's own libvirt");
        let overlay = folder.path().join("m_disposable.qcow2");
        fs::write(&overlay, "").unwrap();
        old.set_overlays(vec![overlay.clone()]);
        new.set_aside_if_elsewhere().unwrap();
        assert!(!new.exists() && overlay.exists());
        new.begin(&domain).unwrap();
        let known = |name: &str| (name == "m").then(|| "x:///new".to_owned());
        let orphans = RunMarker::orphans(folder.path(), known);
        let [left] = &orphans[..] else { panic!("{orphans:?}") };
        assert_eq!(left.recorded_dsn().as_deref(), Some("x:///old"));
        domain.destroy().unwrap();
        left.end_run_elsewhere(&connect, None).unwrap();
        assert!(!left.exists() && !overlay.exists() && new.exists());
    }

    #[test]
    fn token_differs_for_each_run() {
        assert_ne!(kernel_id("uuid").unwrap(), kernel_id("uuid").unwrap());
        assert_eq!(kernel_id("boot_id").unwrap(), kernel_id("boot_id").unwrap());
    }

    /// Starts a domain of libvirt's driver for tests, whose domains are in the memory of this process.
    fn started(connect: &Connect, name: &str) -> Domain {
        let memory = "<memory unit='MiB'>8</memory>";
        let xml =
            format!("<domain type='test'><name>{name}</name>{memory}<os><type>hvm</type></os></domain>");
        connect.create_domain_xml(&xml, 0).unwrap()
    }

    #[test]
    fn marker_matches_only_its_own_domain_in_each_step_of_a_start() {
        let connect = Connect::open(Some("test:///default")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let marker = RunMarker::of("m", folder.path());
        let [own, other] = ["m", "other"].map(|name| started(&connect, name));
        assert!(!marker.matches(&own).unwrap(), "there is no marker");
        marker.begin(&own).unwrap();
        // Both are paused, as any domain is that somebody has just reverted.
        own.suspend().unwrap();
        other.suspend().unwrap();
        assert!(marker.matches(&own).unwrap());
        assert!(!marker.matches(&other).unwrap(), "it is another domain");
        own.resume().unwrap();
        assert!(!marker.matches(&own).unwrap(), "a guest never runs without its token");
        own.suspend().unwrap();
        marker.mark(&own).unwrap();
        own.resume().unwrap();
        assert!(marker.matches(&own).unwrap(), "it has the token");
        assert!(!marker.matches(&other).unwrap());
        assert_eq!(marker.resumed_id(), None);
        marker.set_resumed(&own);
        assert_eq!(marker.resumed_id(), own.id());
        // The next run of the same domain has no token.
        own.destroy().unwrap();
        let again = started(&connect, "m");
        again.suspend().unwrap();
        assert!(!marker.matches(&again).unwrap());
        again.destroy().unwrap();
        other.destroy().unwrap();
    }

    #[test]
    fn marker_of_an_earlier_boot_matches_no_paused_domain() {
        let connect = Connect::open(Some("test:///default")).unwrap();
        let marker = RunMarker::of("m", Path::new("/none"));
        let domain = started(&connect, "of-an-earlier-boot");
        domain.suspend().unwrap();
        let uuid = domain.uuid_string().unwrap();
        let boot = kernel_id("boot_id").unwrap();
        let run = Run { uuid, token: "t".into(), boot, ..Run::default() };
        marker.write(run.clone());
        assert!(marker.matches(&domain).unwrap());
        marker.write(Run { boot: "earlier".into(), ..run.clone() });
        assert!(!marker.matches(&domain).unwrap());
        marker.write(Run { marked: true, ..run });
        assert!(!marker.matches(&domain).unwrap(), "it has lost its token");
        domain.destroy().unwrap();
    }
}
