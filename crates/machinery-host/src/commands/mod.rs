//! The commands that are more than a request: `check`, `conformance`, `import`, `new-plugin` and `upgrade`.

pub mod check;
pub mod conformance;
pub mod import;
pub mod new_plugin;
pub mod upgrade;
