//! Everything that the machines share.

use std::path::PathBuf;
use std::sync::Arc;

use machinery::Host;
use machinery_backend::Budget;

/// Everything that the machines share.
pub struct ExampleProcess {
    pub host: Host,
    /// The folder that has the folders of runs.
    pub state_dir: PathBuf,
    /// The memory for standbys.
    pub budget: Arc<Budget>,
    pub program: PathBuf,
}
