//! The exporter: the metrics for Prometheus, at an address (`http`) and in a file (`textfile`). Both are off by
//! default.
//!
//! ```text
//! settings ─▶ address and file are served ─▶ a reload: the new settings
//!                                        └─▶ the host ends: the file is removed
//! ```
//!
//! `page` collects the values when somebody reads them, so that metrics cost nothing meanwhile; `machines` has those
//! of machines. An exporter that fails is an error in the log; the host serves on.

mod families;
mod http;
mod machines;
mod page;
mod probe;
mod textfile;

use std::future::pending;
use std::sync::Arc;

use crate::actions::context::Reloads;
use crate::config::Export;
use crate::manager::Manager;
use page::Page;

/// Exports the metrics until the host ends.
pub async fn run(manager: Arc<Manager>) {
    let mut reloads = manager.queues().context().reloads();
    let mut ended = manager.ended().subscribe();
    let page = Arc::new(Page::new(Arc::clone(&manager)));
    loop {
        let export = reloads.settings().export;
        let goes_on = tokio::select! {
            () = serve(&page, &export, reloads.clone()) => true,
            // A reload that changes nothing here interrupts no reader.
            () = reloads.next(|settings| settings.export != export) => true,
            // The sender lives as long as the manager.
            _ = ended.wait_for(|ended| *ended) => false,
        };
        if let Some(file) = &export.textfile {
            textfile::remove(file);
        }
        if !goes_on {
            return;
        }
    }
}

/// Exports to these places until it is dropped.
async fn serve(page: &Arc<Page>, export: &Export, reloads: Reloads) {
    let http = async {
        match export.listen {
            Some(address) => http::serve(address, page, reloads).await,
            None => pending().await,
        }
    };
    let file = async {
        match &export.textfile {
            Some(file) => textfile::keep(file, page).await,
            None => pending().await,
        }
    };
    tokio::join!(http, file);
}
