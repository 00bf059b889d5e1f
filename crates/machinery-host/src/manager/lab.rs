//! A manager for tests.

use std::path::Path;
use std::sync::Arc;

use super::Manager;
use super::replacement::Replacement;
use crate::actions::context::ActionContext;
use crate::actions::metrics::Metrics;
use crate::actions::queues::Queues;
use crate::client_file::Folders;
use crate::config::Config;
use crate::cwd::Cwd;
use crate::events::Events;
use crate::fleet::Fleet;
use crate::fleet::state_file::StateStore;
use crate::plugin::search::PluginSearch;
use crate::reload::Reloader;

/// Returns the manager of a host without machines, with its fleet and its folder.
pub fn manager() -> (tempfile::TempDir, Arc<Fleet>, Arc<Manager>) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("conf")).unwrap();
    std::fs::write(folder.path().join(".cuckoocwd"), "").unwrap();
    std::fs::write(folder.path().join("conf/cuckoo.yaml"), "machineries: [qemu]\n").unwrap();
    let cwd = Cwd::find(Some(folder.path())).unwrap();
    let (config, search) =
        (Config::read(&cwd).unwrap(), PluginSearch { folders: Vec::new(), allow_insecure: false });
    let (fleet, events, metrics) = (Arc::<Fleet>::default(), Events::default(), Arc::<Metrics>::default());
    let state = StateStore::open(folder.path(), Arc::clone(&fleet)).unwrap();
    let context = ActionContext::new(&config, Folders::of(&cwd), Arc::clone(&metrics), Arc::clone(&state));
    let queues = Arc::new(Queues::new(Arc::new(context)));
    let (of_fleet, of_queues) = (Arc::clone(&fleet), Arc::clone(&queues));
    let replacement = Replacement::new(Path::new("/none"), &cwd, &search);
    let reloader =
        Reloader::new(cwd, search, config, of_fleet, of_queues, Arc::clone(&state), events.clone()).unwrap();
    let manager = Manager::new(Arc::clone(&fleet), queues, reloader, metrics, state, events, replacement);
    (folder, fleet, Arc::new(manager))
}
