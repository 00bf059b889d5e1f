//! The commands that are more than a request: `check`, `conformance`, `end-runs`, `import`, `new-plugin` and `upgrade`.

pub mod check;
pub mod conformance;
pub mod end_runs;
pub mod import;
pub mod new_plugin;
pub mod upgrade;
