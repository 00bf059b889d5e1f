//! A turn that one machine at a time has, for work that several machines would do twice.

use std::sync::{Arc, Condvar, Mutex};

use machinery::{Deadline, Result};
use machinery_backend::Cancellation;
use machinery_backend::sync::{lock, wait_while};

/// The turns for one kind of work.
#[derive(Clone, Default)]
pub struct Turns(Arc<Taken>);

#[derive(Default)]
struct Taken {
    /// True while a machine has the turn.
    is_taken: Mutex<bool>,
    changed: Condvar,
}

/// The turn, until it is dropped.
pub struct Turn(Turns);

impl Turns {
    /// Waits until no other machine has the turn. It passes on when its holder succeeds, fails or is cancelled.
    ///
    /// # Errors
    /// The operation is cancelled, or the deadline passes while another machine does `what`.
    pub fn wait(&self, what: &str, cancellation: &Cancellation, deadline: Deadline) -> Result<Turn> {
        let waiting = Arc::downgrade(&self.0);
        cancellation.on_cancel(move || waiting.upgrade().iter().for_each(|taken| taken.wake()));
        let waits = |is_taken: &mut bool| *is_taken && !cancellation.is_cancelled();
        let mut is_taken = wait_while(&self.0.changed, lock(&self.0.is_taken), deadline, waits);
        cancellation.ensure_wanted()?;
        if *is_taken {
            return Err(deadline.timeout(&format!("another machine to {what}")));
        }
        *is_taken = true;
        Ok(Turn(self.clone()))
    }
}

impl Taken {
    fn wake(&self) {
        // A machine that is about to wait has the lock until it waits.
        drop(lock(&self.is_taken));
        self.changed.notify_all();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *lock(&self.0.0.is_taken) = false;
        self.0.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::ErrorKind;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    #[test]
    fn turn_passes_on_when_its_holder_drops_it() {
        let turns = Turns::default();
        let first = turns.wait("build", &Cancellation::default(), soon()).unwrap();
        let (sender, order) = mpsc::channel();
        let (other, of_other) = (turns.clone(), sender.clone());
        let second = thread::spawn(move || {
            let _turn = other.wait("build", &Cancellation::default(), soon()).unwrap();
            of_other.send("second").unwrap();
        });
        let late = turns.wait("build", &Cancellation::default(), Deadline::after(Duration::from_millis(5)));
        assert_eq!(late.err().unwrap().kind(), ErrorKind::Timeout);
        sender.send("first").unwrap();
        drop(first);
        second.join().unwrap();
        assert_eq!([order.recv().unwrap(), order.recv().unwrap()], ["first", "second"]);
    }

    #[test]
    fn waiting_machine_gives_up_when_it_is_cancelled() {
        let turns = Turns::default();
        let _first = turns.wait("build", &Cancellation::default(), soon()).unwrap();
        let (cancellation, other) = (Cancellation::default(), turns.clone());
        let waiting = cancellation.clone();
        let second = thread::spawn(move || other.wait("build", &waiting, soon()).err().unwrap());
        cancellation.cancel();
        assert_eq!(second.join().unwrap().kind(), ErrorKind::Interrupted);
    }
}
