//! The meaning of libvirt's states and events for a machine.
//!
//! libvirt has a state with a reason for each domain, and events with details. Both are mapped to a
//! [`StateReport`]: a state of the interface, and a reason where the state needs one.

use machinery::{Error, GUEST_POWERED_OFF, Result, State};
use virt::domain::{
    DomainPausedReason, DomainState, DomainStateEnum, DomainStateReason, DomainStateReasonEnum,
};
use virt::enumutil::Enum;
use virt_sys as sys;

use crate::events::Event;

/// A state, and its reason where the state needs one, else an empty text.
pub type StateReport = (State, String);

/// Maps a domain's state. Source: `virDomainState` and its reasons in libvirt's libvirt-domain.h.
///
/// # Errors
/// The state is unknown to this plugin.
pub fn state_of_domain(state: DomainStateEnum, reason: DomainStateReasonEnum) -> Result<StateReport> {
    let plain = |state| Ok((state, String::new()));
    match state {
        Enum::Known(DomainState::Running | DomainState::Blocked) => plain(State::Running),
        Enum::Known(DomainState::Paused) => Ok(paused(reason)),
        Enum::Known(DomainState::Shutdown) => plain(State::Stopping),
        Enum::Known(DomainState::Shutoff) => plain(State::Poweroff),
        Enum::Known(DomainState::Crashed) => Ok((State::Error, "the guest crashed".to_owned())),
        Enum::Known(DomainState::PMSuspended) => plain(State::Suspended),
        other => Err(Error::unexpected_state(format!(
            "libvirt's domain state {} is unknown to this plugin",
            other.to_raw()
        ))
        .advice("Stop the machine; if the state comes again, this libvirt is too new for this plugin")),
    }
}

/// Maps a paused domain: a pause is a step of an action, or the sign of a problem.
fn paused(reason: DomainStateReasonEnum) -> StateReport {
    let Enum::Known(DomainStateReason::Paused(Enum::Known(reason))) = reason else {
        return paused_error("for a reason that is unknown to this plugin");
    };
    match reason {
        DomainPausedReason::Dump
        | DomainPausedReason::FromSnapshot
        | DomainPausedReason::Snapshot
        | DomainPausedReason::StartingUp => (State::Paused, String::new()),
        DomainPausedReason::User => paused_error("by somebody else"),
        DomainPausedReason::Migration => paused_error("while it is migrated"),
        DomainPausedReason::Save => paused_error("while its state is saved"),
        DomainPausedReason::IOError => paused_error("because its disk failed. Look at the free space there"),
        DomainPausedReason::Watchdog => paused_error("because its watchdog expired"),
        DomainPausedReason::ShuttingDown => paused_error("while it shuts down"),
        DomainPausedReason::Crashed => paused_error("because it crashed"),
        DomainPausedReason::PostCopy | DomainPausedReason::PostCopyFailed => {
            paused_error("after a migration")
        }
        DomainPausedReason::APIError => {
            paused_error("because libvirt failed at something. Look at libvirtd's log")
        }
        DomainPausedReason::Unknown => paused_error("and libvirt does not say why"),
    }
}

fn paused_error(why: &str) -> StateReport {
    (State::Error, format!("the guest is paused {why}"))
}

/// Maps an event; `None` if the event does not change the machine's state.
pub fn state_of_event(event: &Event) -> Option<StateReport> {
    match event {
        Event::DiskFailed { disk, reason } => {
            let reason = if reason.is_empty() { "no reason given" } else { reason };
            let space = if reason == "enospc" { ": no space is left" } else { "" };
            let why = format!("the disk {disk} failed and the guest was paused ({reason}){space}");
            Some((State::Error, why))
        }
        Event::Lifecycle { event, detail } => lifecycle(*event, *detail),
        // A guest may reboot; it keeps running.
        Event::Reset => None,
    }
}

fn lifecycle(event: sys::virDomainEventType, detail: u32) -> Option<StateReport> {
    Some(match event {
        sys::VIR_DOMAIN_EVENT_STARTED => (State::Running, "somebody started the domain".to_owned()),
        sys::VIR_DOMAIN_EVENT_RESUMED => (State::Running, String::new()),
        sys::VIR_DOMAIN_EVENT_SUSPENDED => suspended(detail)?,
        sys::VIR_DOMAIN_EVENT_SHUTDOWN => (State::Stopping, shutdown(detail).to_owned()),
        sys::VIR_DOMAIN_EVENT_STOPPED => (State::Poweroff, stopped(detail).to_owned()),
        sys::VIR_DOMAIN_EVENT_PMSUSPENDED => (State::Suspended, "the guest suspended itself".to_owned()),
        sys::VIR_DOMAIN_EVENT_CRASHED => (State::Error, "the guest crashed".to_owned()),
        _ => return None,
    })
}

fn suspended(detail: u32) -> Option<StateReport> {
    Some(match detail {
        sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR => paused_error("because its disk failed"),
        sys::VIR_DOMAIN_EVENT_SUSPENDED_WATCHDOG => paused_error("because its watchdog expired"),
        sys::VIR_DOMAIN_EVENT_SUSPENDED_API_ERROR => paused_error("because libvirt failed at something"),
        sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED => (State::Paused, String::new()),
        _ => return None,
    })
}

fn shutdown(detail: u32) -> &'static str {
    match detail {
        sys::VIR_DOMAIN_EVENT_SHUTDOWN_GUEST => "the guest powers itself off",
        sys::VIR_DOMAIN_EVENT_SHUTDOWN_HOST => "QEMU was asked to end by somebody else",
        _ => "the domain shuts down",
    }
}

fn stopped(detail: u32) -> &'static str {
    match detail {
        sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => GUEST_POWERED_OFF,
        sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED => "the domain was destroyed",
        sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED => "the guest crashed",
        sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED => "the domain was migrated to another host",
        sys::VIR_DOMAIN_EVENT_STOPPED_SAVED => "somebody saved the domain and stopped it",
        sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => {
            "its QEMU ended. The domain's log in /var/log/libvirt/qemu may say why"
        }
        sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT => "somebody reverted the domain to a snapshot",
        _ => "the domain ended",
    }
}

/// Reports whether the domain has ended with the event.
pub fn is_end(event: &Event) -> bool {
    matches!(event, Event::Lifecycle { event: sys::VIR_DOMAIN_EVENT_STOPPED, .. })
}

/// Reports whether the event saves the domain's state, so that its run may be resumed.
pub fn is_save(event: &Event) -> bool {
    matches!(
        event,
        Event::Lifecycle {
            event: sys::VIR_DOMAIN_EVENT_STOPPED,
            detail: sys::VIR_DOMAIN_EVENT_STOPPED_SAVED
        }
    )
}

/// Reports whether the domain begins to run with the event.
pub fn is_start(event: &Event) -> bool {
    matches!(event, Event::Lifecycle { event: sys::VIR_DOMAIN_EVENT_STARTED, .. })
}

/// Reports whether the event is a step of a revert to a paused domain. Such an event may arrive after the revert
/// has returned.
pub fn is_revert_step(event: &Event) -> bool {
    matches!(
        event,
        Event::Lifecycle { event: sys::VIR_DOMAIN_EVENT_STARTED | sys::VIR_DOMAIN_EVENT_DEFINED, .. }
            | Event::Lifecycle {
                event: sys::VIR_DOMAIN_EVENT_SUSPENDED,
                detail: sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED
            }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(state: u32, reason: i32) -> Result<StateReport> {
        let state = DomainStateEnum::from_raw(state);
        let reason = match state {
            Enum::Known(DomainState::Paused) => {
                let reason = virt::domain::DomainPausedReasonEnum::from_raw(reason.cast_unsigned());
                Enum::Known(DomainStateReason::Paused(reason))
            }
            _ => Enum::Unknown(reason),
        };
        state_of_domain(state, reason)
    }

    #[test]
    fn state_is_mapped_for_each_state_of_libvirt() {
        let wanted = [
            (1, State::Running),
            (2, State::Running),
            (4, State::Stopping),
            (5, State::Poweroff),
            (6, State::Error),
            (7, State::Suspended),
        ];
        for (raw, state) in wanted {
            assert_eq!(of(raw, 0).unwrap().0, state, "{raw}");
        }
        assert!(of(0, 0).is_err());
        assert!(of(99, 0).unwrap_err().to_string().contains("99"));
    }

    #[test]
    fn pause_is_an_error_unless_an_action_causes_it() {
        for reason in 0..=15 {
            let (state, why) = of(sys::VIR_DOMAIN_PAUSED, reason).unwrap();
            let harmless = [
                sys::VIR_DOMAIN_PAUSED_DUMP,
                sys::VIR_DOMAIN_PAUSED_FROM_SNAPSHOT,
                sys::VIR_DOMAIN_PAUSED_SNAPSHOT,
                sys::VIR_DOMAIN_PAUSED_STARTING_UP,
            ];
            let harmless = harmless.contains(&reason.cast_unsigned());
            assert_eq!(state, if harmless { State::Paused } else { State::Error }, "{reason}");
            assert_eq!(why.is_empty(), harmless, "{reason}: {why}");
        }
    }

    #[test]
    fn event_of_an_accident_has_a_reason() {
        let mapped = |event, detail| state_of_event(&Event::Lifecycle { event, detail }).unwrap();
        let (state, why) = mapped(sys::VIR_DOMAIN_EVENT_STOPPED, sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN);
        assert_eq!((state, why.as_str()), (State::Poweroff, "the guest powered itself off"));
        let (state, why) = mapped(sys::VIR_DOMAIN_EVENT_STOPPED, sys::VIR_DOMAIN_EVENT_STOPPED_FAILED);
        assert!(state == State::Poweroff && why.contains("QEMU ended"), "{why}");
        let full = Event::DiskFailed { disk: "/d/x.qcow2".into(), reason: "enospc".into() };
        let (state, why) = state_of_event(&full).unwrap();
        assert!(state == State::Error && why.contains("/d/x.qcow2") && why.contains("no space"), "{why}");
        assert!(state_of_event(&Event::Lifecycle { event: 0, detail: 0 }).is_none());
    }

    #[test]
    fn lifecycle_event_has_the_state_of_the_machine() {
        let suspended = sys::VIR_DOMAIN_EVENT_SUSPENDED;
        for (event, detail, state, reason) in [
            (sys::VIR_DOMAIN_EVENT_STARTED, 0, Some(State::Running), "somebody"),
            (sys::VIR_DOMAIN_EVENT_RESUMED, 0, Some(State::Running), ""),
            (sys::VIR_DOMAIN_EVENT_SHUTDOWN, 0, Some(State::Stopping), "shuts down"),
            (sys::VIR_DOMAIN_EVENT_PMSUSPENDED, 0, Some(State::Suspended), "suspended itself"),
            (sys::VIR_DOMAIN_EVENT_CRASHED, 0, Some(State::Error), "crashed"),
            (suspended, sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED, Some(State::Paused), ""),
            (suspended, sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR, Some(State::Error), "disk"),
            (suspended, sys::VIR_DOMAIN_EVENT_SUSPENDED_WATCHDOG, Some(State::Error), "watchdog"),
            (suspended, sys::VIR_DOMAIN_EVENT_SUSPENDED_API_ERROR, Some(State::Error), "libvirt failed"),
            (suspended, sys::VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED, None, ""),
            (suspended, sys::VIR_DOMAIN_EVENT_SUSPENDED_RESTORED, None, ""),
            (suspended, sys::VIR_DOMAIN_EVENT_SUSPENDED_FROM_SNAPSHOT, None, ""),
            (sys::VIR_DOMAIN_EVENT_DEFINED, 0, None, ""),
            (sys::VIR_DOMAIN_EVENT_UNDEFINED, 0, None, ""),
        ] {
            let found = state_of_event(&Event::Lifecycle { event, detail });
            assert_eq!(found.as_ref().map(|(state, _)| *state), state, "{event} {detail}");
            let text = found.map(|(_, reason)| reason).unwrap_or_default();
            assert!(
                text.contains(reason) && (reason.is_empty() == text.is_empty()),
                "{event} {detail}: {text}"
            );
        }
    }

    #[test]
    fn end_of_a_domain_has_its_cause_as_reason() {
        for (detail, reason) in [
            (sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN, GUEST_POWERED_OFF),
            (sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED, "destroyed"),
            (sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED, "crashed"),
            (sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED, "migrated"),
            (sys::VIR_DOMAIN_EVENT_STOPPED_SAVED, "saved"),
            (sys::VIR_DOMAIN_EVENT_STOPPED_FAILED, "QEMU ended"),
            (sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT, "reverted"),
            (99, "ended"),
        ] {
            let event = Event::Lifecycle { event: sys::VIR_DOMAIN_EVENT_STOPPED, detail };
            let (state, why) = state_of_event(&event).unwrap();
            assert!(state == State::Poweroff && why.contains(reason), "{detail}: {why}");
            assert!(is_end(&event) && !is_start(&event));
            assert_eq!(is_save(&event), detail == sys::VIR_DOMAIN_EVENT_STOPPED_SAVED, "{detail}");
        }
        let down = |detail| {
            let event = Event::Lifecycle { event: sys::VIR_DOMAIN_EVENT_SHUTDOWN, detail };
            state_of_event(&event).unwrap().1
        };
        assert!(down(sys::VIR_DOMAIN_EVENT_SHUTDOWN_GUEST).contains("guest powers itself off"));
        assert!(down(sys::VIR_DOMAIN_EVENT_SHUTDOWN_HOST).contains("somebody else"));
        assert!(state_of_event(&Event::Reset).is_none());
    }

    #[test]
    fn event_has_the_kinds_of_its_detail() {
        let event = |event, detail| Event::Lifecycle { event, detail };
        let saved = event(sys::VIR_DOMAIN_EVENT_STOPPED, sys::VIR_DOMAIN_EVENT_STOPPED_SAVED);
        let destroyed = event(sys::VIR_DOMAIN_EVENT_STOPPED, sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED);
        let started = event(sys::VIR_DOMAIN_EVENT_STARTED, 0);
        let paused = event(sys::VIR_DOMAIN_EVENT_SUSPENDED, sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED);
        let failed = event(sys::VIR_DOMAIN_EVENT_SUSPENDED, sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR);
        for (event, expected) in [
            // In this order: an end, a save, a start, a step of a revert.
            (&saved, [true, true, false, false]),
            (&destroyed, [true, false, false, false]),
            (&started, [false, false, true, true]),
            (&paused, [false, false, false, true]),
            (&failed, [false, false, false, false]),
            (&Event::Reset, [false, false, false, false]),
        ] {
            let kinds = [is_end(event), is_save(event), is_start(event), is_revert_step(event)];
            assert_eq!(kinds, expected);
        }
    }
}
