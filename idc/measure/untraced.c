/* The transactions of idc/endpoint/transact.c once more, from the same source, less the statements that note moments for
 * a trace: what tracing costs while it is off is measured against these. */
#define IDC_TRACED 0
#define idc_trips_observe idc_untraced_trips_observe
#define idc_trip idc_untraced_trip
#define idc_dropped idc_untraced_dropped
#define idc_engine_start idc_untraced_start
#define idc_engine_submit idc_untraced_submit
#define idc_engine_answered idc_untraced_answered
#define idc_engine_take idc_untraced_take
#define idc_engine_run idc_untraced_run
#define idc_line_post idc_untraced_line_post
#define idc_line_notify idc_untraced_line_notify
#define idc_line_send idc_untraced_line_send
#define idc_line_next idc_untraced_line_next
#define idc_line_take idc_untraced_line_take
#define idc_line_call idc_untraced_line_call
#define idc_line_transact idc_untraced_line_transact
#define idc_line_request idc_untraced_line_request
#define idc_line_answer idc_untraced_line_answer
#include "../endpoint/transact.c"
