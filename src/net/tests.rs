//! Slots with real packets, in network namespaces that stand in for the host.

use std::time::Duration;

use snapshotter::tap;

use super::plan::{CANDIDATES, Plan};
use super::policy::Policy;
use super::slot::Slot;

fn plan() -> Plan {
    Plan::new("/test", CANDIDATES[0], false)
}

#[test]
fn a_slot_is_made_and_goes_with_its_descriptor() {
    tap::new_namespace(|| {
        let plan = plan();
        let slot = Slot::make(&plan, 7, &[]).unwrap();
        slot.attach([2, 0, 0, 0, 0, 7]).unwrap();
        slot.set_policy(&Policy::default()).unwrap();
        let name = plan.link(7);
        let there =
            || std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains(&name);
        assert!(there());
        let again = Slot::make(&plan, 7, &[]).unwrap_err();
        assert_eq!(again.kind(), std::io::ErrorKind::AlreadyExists, "{again}");
        drop(slot);
        let started = std::time::Instant::now();
        while there() {
            assert!(started.elapsed() < Duration::from_secs(60), "the cable stays");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    })
    .unwrap();
}
