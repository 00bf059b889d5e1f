//! The screen of a running machine, for somebody who watches it. It is no action: it is neither counted nor logged, and an
//! error of it stays with the watcher.
//!
//! A watcher must not delay an action. So the machine's worker takes a screen only when nothing else waits, and has little
//! time for it.

use std::sync::Arc;
use std::time::Duration;

use machinery::State;

use super::executor::ActionExecutor;
use super::inspection::within;
use super::message::{NoScreen, Screen};
use crate::client_file::PrivateFile;

/// The time in which a machine must show its screen. An action that arrives meanwhile waits. A plugin that returns later
/// keeps the machine in the pool as long as it returns within the time of a screenshot, as for an action.
const SCREEN_TIMEOUT: Duration = Duration::from_secs(5);

impl ActionExecutor {
    /// Returns the screen. A plugin that misbehaves takes the machine out of the pool, as in an action.
    ///
    /// # Errors
    /// The machine does not run, its machinery shows no screens, or the plugin fails.
    pub async fn screen(&mut self) -> Screen {
        if !self.machine.machinery.capabilities.screenshot {
            return Err(NoScreen::Unsupported);
        }
        if self.machine.status().state != State::Running || self.calls.is_abandoned() {
            return Err(NoScreen::Off);
        }
        let (folders, limit) = (self.context.folders.clone(), self.screen_limit());
        let failed = |error: machinery::Error| NoScreen::Failed(error.to_string());
        let staged = within(limit, "make the file", move || PrivateFile::staged(&folders).map(Arc::new));
        let file = staged.await.map_err(failed)?;
        if let Err(error) = self.calls.screen(Arc::clone(&file), limit).await {
            let kind = error.kind();
            let error = error.action("showing the screen").machine(self.machine.name());
            if error.is_plugin_fault() {
                let reason = error.to_string();
                tracing::error!(machine = self.machine.name(), reason, "its screen cannot be shown");
                self.machine.add_error(&reason);
                self.context.take_out(&self.machine, kind, &reason).await;
            }
            return Err(failed(error));
        }
        within(limit, "read the screen", move || file.picture()).await.map_err(failed)
    }

    fn screen_limit(&self) -> Duration {
        self.context.timeouts().screenshot.min(SCREEN_TIMEOUT)
    }
}

#[cfg(test)]
mod tests {
    use machinery::{Capabilities, Error};
    use tokio::time::timeout;

    use super::super::lab::Lab;
    use super::*;
    use crate::fleet::fake_plugin::FakePlugin;

    fn lab(screenshot: bool) -> Lab {
        let plugin = FakePlugin::default();
        plugin.set_capabilities(Capabilities { screenshot, ..Capabilities::default() });
        Lab::with(plugin, "")
    }

    #[tokio::test]
    async fn screen_is_that_of_a_running_machine_that_has_one() {
        let unable = lab(false);
        unable.start_foreign_run();
        assert_eq!(unable.executor().screen().await, Err(NoScreen::Unsupported));
        let lab = lab(true);
        assert_eq!(lab.executor().screen().await, Err(NoScreen::Off));
        lab.start_foreign_run();
        let shown = lab.executor().screen().await;
        assert!(matches!(&shown, Err(NoScreen::Failed(why)) if why.contains("no file")), "{shown:?}");
        assert_eq!(lab.plugin.take_calls(), ["screenshot"]);
    }

    #[tokio::test]
    async fn failed_screen_leaves_the_machine_in_the_pool_and_a_plugin_fault_does_not() {
        let lab = lab(true);
        lab.start_foreign_run();
        lab.plugin.fail("screenshot", Error::failed("no display"));
        assert!(matches!(lab.executor().screen().await, Err(NoScreen::Failed(_))));
        assert!(lab.machine.status().errors.is_empty() && lab.disabled_reason().is_none());
        lab.plugin.fail("screenshot", Error::new(machinery::ErrorKind::PluginPanicked, "index"));
        assert!(matches!(lab.executor().screen().await, Err(NoScreen::Failed(_))));
        assert!(lab.machine.status().errors[0].contains("index"));
        assert!(lab.disabled_reason().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn slow_screen_leaves_the_machine_in_the_pool_until_the_time_of_a_screenshot() {
        let lab = lab(true);
        lab.start_foreign_run();
        let release = lab.plugin.block("screenshot");
        let mut executor = lab.executor();
        let mut screen = std::pin::pin!(executor.screen());
        // The call blocks a thread, so the paused clock moves only here.
        let early = tokio::select! {
            shown = &mut screen => Some(shown),
            () = lab.plugin.called("screenshot") => None,
        };
        assert_eq!(early, None);
        tokio::time::advance(Duration::from_secs(29)).await;
        assert!(timeout(Duration::ZERO, &mut screen).await.is_err());
        assert_eq!((lab.machine.status().state, lab.disabled_reason()), (State::Running, None));
        tokio::time::advance(Duration::from_secs(4)).await;
        assert!(matches!(screen.await, Err(NoScreen::Failed(why)) if why.contains("did not return")));
        assert_eq!(lab.machine.status().state, State::Error);
        assert!(lab.quarantine().is_some() || lab.disabled_reason().is_some());
        drop(release);
    }
}
