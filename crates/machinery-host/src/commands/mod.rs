//! The commands that need no running host: `check`, `conformance`, `import` and `new-plugin`.

pub mod check;
pub mod conformance;
pub mod import;
pub mod new_plugin;
